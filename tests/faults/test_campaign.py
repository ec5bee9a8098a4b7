"""Contract: killed at moments of all kinds, a run leaves what it leaves undisturbed.

The long form, for all scripts: see README.md here.
"""

import signal

from campaign import Campaign
from victims import Kill

WRITING = ("caching", "validation", "checkpoint", "rotation", "export")  # the phases that change files, as they come


def test_killed_at_the_first_change_of_each_phase(tmp_path):
    campaign = Campaign(tmp_path, seed=0, scripts=["prior_lora"], cached=(True,))
    assert campaign.trial([Kill(signal.SIGKILL, phase=phase, at_change=True) for phase in WRITING]) == len(WRITING)
    assert campaign.tally.faults == []


def test_short_campaign(tmp_path):
    """Which phases its random moments fall into depends on the machine's speed, so it is not asked."""
    campaign, kills = Campaign(tmp_path, seed=2, scripts=["sd", "prior_lora"], chain=3), 0
    while kills < 6:
        kills += campaign.trial()
    print(campaign.tally.table(campaign.scripts))
    assert campaign.tally.faults == []
