"""Validation images: saved singly and in a labelled grid whose first row is the untouched model."""

import numpy as np
import pytest
from conftest import load_script
from PIL import Image

from t2i_training.report import validation
from t2i_training.run import lifecycle
from t2i_training.stopping import StopRequest

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
PROMPTS = ["a red bird", "a green bird on a very long branch of a very old oak tree beside a river", ""]


def picture(colour, size=(32, 32)) -> Image.Image:
    return Image.new("RGB", size, colour)


def has_ink(region: Image.Image) -> bool:
    return np.asarray(region.convert("L")).min() < 100


def test_a_users_images_take_twenty_steps(few_sampling_steps):
    """The scripts hand it to their pipelines; test_train_text_to_image_flax.py sees twenty of them run."""
    assert few_sampling_steps == 20


def test_grid_size_by_hand():
    """110 for the row labels, then 160 + 6 a column; 8 + 19 a line of the longest prompt, then 160 + 6 a row."""
    rows = [("base model", [picture(c) for c in COLOURS[:2]]), ("step 500", [picture(c) for c in COLOURS[:2]])]
    assert validation.make_grid(["a", "b"], rows).size == (110 + 2 * 166, 27 + 2 * 166)
    assert validation.make_grid(["a", "b"], rows[:1]).size == (110 + 2 * 166, 27 + 166)
    large = [("base model", [picture(COLOURS[0], (512, 256))])]
    assert validation.make_grid(["a"], large).size == (110 + 518, 27 + 256 + 6)


def test_pictures_stand_in_their_cells():
    rows = [("base model", [picture(c) for c in COLOURS]), ("step 5", [picture(c) for c in reversed(COLOURS)])]
    grid = validation.make_grid(["a", "b", "c"], rows)
    for row, colours in enumerate((COLOURS, COLOURS[::-1])):
        for column, colour in enumerate(colours):
            left, top = 110 + column * 166, 27 + row * 166
            cell = grid.crop((left, top, left + 160, top + 160))
            assert cell.getcolors() == [(160 * 160, colour)]


def test_labels_stand_beside_and_above():
    grid = validation.make_grid(PROMPTS, [("base model", [picture(c) for c in COLOURS])])
    top = grid.height - 166
    assert has_ink(grid.crop((0, top, 110, grid.height)))
    assert all(has_ink(grid.crop((110 + i * 166, 0, 110 + i * 166 + 160, top))) for i in range(3))
    assert not has_ink(grid.crop((0, 0, 110, top)))  # nothing in the corner, nothing between the columns
    assert not has_ink(grid.crop((110 + 160, 0, 110 + 166, grid.height)))


def test_labels_differ_with_prompt_and_step():
    def grid(prompt, label):
        return np.asarray(validation.make_grid([prompt], [(label, [picture(COLOURS[0])])]))

    base = grid("a bird", "step 1")
    other = grid("a bird", "step 2") != base
    assert other[:, :110].any()
    assert not other[:, 110:].any()
    other = grid("a beard", "step 1") != base
    assert other[:27, 110:].any()
    assert not other[27:].any()


@pytest.mark.parametrize("prompt", ["x" * 500, "word " * 200, "été — Ωμέγα — привет"])
def test_any_prompt_stays_within_its_column(prompt):
    grid = validation.make_grid([prompt, "b"], [("base model", [picture(COLOURS[0])] * 2)])
    assert grid.height <= 8 + 4 * 19 + 166  # four lines at the most
    assert not has_ink(grid.crop((110 + 160, 0, 110 + 166, grid.height)))


def test_prompt_that_is_cut_says_so():
    """Four lines of 17 letters fit; of more, an ellipsis tells."""
    fits, cut = (
        np.asarray(validation.make_grid([prompt], [("base model", [picture(COLOURS[0])])]))
        for prompt in ("word of seventeen " * 4, "word of seventeen " * 5)
    )
    assert fits.shape == cut.shape
    assert (fits != cut).any()


def test_small_pictures_are_enlarged_without_smoothing():
    checks = Image.fromarray(np.uint8(np.indices((16, 16)).sum(0) % 2 * 255)).convert("RGB")
    grid = validation.make_grid(["a"], [("base model", [checks])])
    cell = grid.crop((110, 27, 270, 187))
    assert {colour for _, colour in cell.getcolors()} == {(0, 0, 0), (255, 255, 255)}


@pytest.fixture
def accelerator(sd_flags):
    return lifecycle.start(load_script("sd").parse_args(sd_flags()))


def test_first_row_is_the_untouched_model(accelerator, tmp_path):
    """Step 0 gives one row; later steps stand below it, pixel for pixel as it was drawn."""
    drawn = []

    def draw(index):
        drawn.append(index)
        return picture(COLOURS[index])

    validation.validate(draw, PROMPTS, 0, tmp_path, accelerator, StopRequest())
    validation.validate(lambda index: picture((9, 9, 9)), PROMPTS, 40, tmp_path, accelerator, StopRequest())
    assert drawn == [0, 1, 2]
    folder = tmp_path / "validation"
    names = ["step-000000", "step-000000.png", "step-000040", "step-000040.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert sorted(path.name for path in (folder / "step-000040").iterdir()) == ["00.png", "01.png", "02.png"]
    with Image.open(folder / "step-000000" / "01.png") as single:
        assert single.getcolors() == [(32 * 32, COLOURS[1])]
    base, later = (np.asarray(Image.open(folder / f"step-{step:06d}.png")) for step in (0, 40))
    assert later.shape == (base.shape[0] + 166, *base.shape[1:])
    assert np.array_equal(later[: len(base)], base)
    assert (later[len(base) + 80, 110:270] == 9).all()


def test_without_the_untouched_model_there_is_one_row(accelerator, tmp_path):
    """Prompts added on resuming: nothing was drawn at step 0, or fewer images."""
    validation.validate(lambda index: picture(COLOURS[0]), ["a"], 0, tmp_path, accelerator, StopRequest())
    validation.validate(lambda index: picture(COLOURS[index]), ["a", "b"], 7, tmp_path, accelerator, StopRequest())
    with Image.open(tmp_path / "validation" / "step-000007.png") as grid:
        assert grid.size == (110 + 2 * 166, 27 + 166)


def test_pictures_of_nan_are_told(accelerator, tmp_path, caplog):
    """A VAE that overflows gives nan, which diffusers' cast to uint8 makes black."""
    from diffusers.image_processor import VaeImageProcessor

    def draw(index):
        pixels = np.full((1, 32, 32, 3), np.nan if index else 0.5, dtype=np.float32)
        return VaeImageProcessor.numpy_to_pil(pixels)[0]

    validation.validate(draw, ["a"], 0, tmp_path, accelerator, StopRequest())
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    validation.validate(draw, ["a", "b"], 5, tmp_path, accelerator, StopRequest())
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert record.message.startswith("validation images of step 5 are black where a network returned nan; ")
