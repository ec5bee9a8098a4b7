"""Contract: killed a dozen times at moments of all kinds, a run leaves what it leaves undisturbed.

The long form, for all scripts: see README.md here.
"""

from campaign import Campaign


def test_short_campaign(tmp_path):
    campaign, kills = Campaign(tmp_path, seed=2, scripts=["sd", "prior_lora"], chain=6), 0
    while kills < 12:
        kills += campaign.trial()
    print(campaign.tally.table(campaign.scripts))
    assert campaign.tally.faults == []
    assert len({phase for _, phase in campaign.tally.kills}) >= 7, "of eleven"
