from tools.campaign.rows import COLUMNS
from tools.campaign.summary import lines


def test_seeds_of_an_arm_are_summed_up_and_other_rates_and_budgets_are_not_mixed_in():
    def row(seed, auc, rate="0.001", steps="9"):
        values = {"arm": "metro", "lr": rate, "flops": "2.0001e+13", "steps": steps, "seed": seed, "rtd_auc": auc}
        return dict.fromkeys(COLUMNS, "") | values

    rows = [
        row("1", "0.6"),
        row("1", "0.9", rate="0.002"),
        row("2", "0.7"),
        row("3", "0.5"),
        row("1", "0.8", steps="8"),
    ]
    assert list(lines(rows)) == [
        "| metro | 0.001 | 2e+13 | 1 | rtd_auc | 0.8000 | 0.0000 |  |",
        "| metro | 0.001 | 2e+13 | 3 | rtd_auc | 0.6000 | 0.2000 | 0.0577 |",
        "| metro | 0.002 | 2e+13 | 1 | rtd_auc | 0.9000 | 0.0000 |  |",
    ]
