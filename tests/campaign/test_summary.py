import gzip
import os
import shlex
import signal
import statistics
import subprocess
import sys
from pathlib import Path

from metro_megatron.cli.command_line import call_with_options
from metro_megatron.commands.compare_runs import main as compare
from tools.campaign.rows import COLUMNS, FINETUNED, put_row, read_baselines, read_rows, scores_beside
from tools.campaign.summary import Options, chosen, comparisons, lines, main


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
        "| metro | 0.001 | 2e+13 | 1 | rtd_auc | 0.8000 |  |  |",
        "| metro | 0.001 | 2e+13 | 3 | rtd_auc | 0.6000 | 0.2000 | 0.0577 |",
        "| metro | 0.002 | 2e+13 | 1 | rtd_auc | 0.9000 |  |  |",
    ]


def put(results, arm, seed, rate, validation, has_scores=True):
    run = f"{arm}-{seed}-{rate}"
    figures = {"flops": "2.2501e+13" if arm == "metro" else "2.2499e+13", "steps": "9", "validation": validation}
    put_row(results, {"run": run, "arm": arm, "seed": seed, "lr": rate, **figures})
    if has_scores:
        scores = scores_beside(results) / run / "scores"
        scores.mkdir(parents=True)
        items = "".join(f'{{"task": "cloze", "id": "{item}", "score": {item}}}\n' for item in (0, 1))
        (scores / "tasks.jsonl.gz").write_bytes(gzip.compress(items.encode()))
        (scores.parent / "run_config.yaml").write_text(f"train: {{seed: {seed}}}\n")


def test_it_ends_with_commands_that_compare_one_run_of_each_seed(tmp_path, capsys):
    results = tmp_path / "results of mine.csv"
    for rate, auc, loss in (("0.001", 0.6, 5.0), ("0.002", 0.7, 4.0), ("0.004", 0.5, 6.0)):
        put(results, "metro", 1, rate, auc)
        put(results, "electra", 1, rate, auc, has_scores=False)
        put(results, "mlm_15", 1, rate, loss)
    put(results, "metro", 2, "0.001", 0.1)  # chosen by what the table had at that time
    put(results, "metro", 3, "0.001", 0.1, has_scores=False)
    picture = tmp_path / "pictures" / "campaign.svg"
    main(Options(str(results), str(picture)))
    *_, lacks, command, made = capsys.readouterr().out.splitlines()
    assert made == f"made {picture}" and "<!-- masked LM, 15%, 2.3e+13 FLOPs -->" in picture.read_text()
    assert lacks == "metro and electra at 2.3e+13 FLOPs: no seed has scores of both yet; make learn adds them"
    words = shlex.split(command)
    assert [Path(word).name for word in words[2:]] == ["--a", "metro-1-0.001", "metro-2-0.001", "--b", "mlm_15-1-0.002"]
    call_with_options(compare, words[2:])
    assert "cloze" in capsys.readouterr().out


def test_tables_of_earlier_campaigns_have_fewer_columns_and_what_is_printed_may_go_to_head():
    table = "docs/results/campaign_reviews.csv"
    command = [sys.executable, "-m", "tools.campaign.summary", "--results", table]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    os.close(writer)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")


def short(value, sign=""):
    return f"{value:{sign}z.3f}".replace("0.", ".", 1)


def cell(found):
    """Mean and interval, bold where it is a verdict; of one seed the mean."""
    if isinstance(found, float):
        return short(found, "+")
    mean = short(found.mean, "+")
    low, high = short(found.mean - found.half_width), short(found.mean + found.half_width)
    return f"{f'**{mean}**' if found.is_verdict else mean} ({low} to {high})"


def published(results, first, others):
    """The lines of tables of docs/results.md: METRO's differences from two arms with medians, from others, and from the
    first one where both are fine-tuned."""
    rows, baselines = read_rows(results), read_baselines(results)
    found = {}
    for one in comparisons(rows, results):
        found[one.arm] = {of_task.task: of_task.found for of_task in one.compare()}
    for task, difference in found[first[0]].items():
        if task.startswith(FINETUNED):
            yield f"| {task.removeprefix(FINETUNED)} | {cell(difference)} |"
    budget = float(chosen(rows, "metro", 2e13)[0]["flops"])

    def median(arm, task):
        return short(statistics.median(float(run[task]) for run in chosen(rows, arm, budget)))

    for task, worth in baselines.items():
        medians = ", ".join(median(arm, task) for arm in ("metro", *first))
        cells = (task, *(cell(found[arm][task]) for arm in first), medians, short(worth["tfidf"]))
        yield f"| {' | '.join(cells)} |\n"
        yield f"| {' | '.join((task, *(f'{cell(found[arm][task])}, {median(arm, task)}' for arm in others)))} |\n"


def test_the_published_tables_are_what_the_tools_say():
    """docs/results.md, of the table and scores beside it: differences, intervals, verdicts, medians, TF-IDF."""
    text = Path("docs/results.md").read_text(encoding="utf-8")
    others = ("mlm_30", "fast_electra", "early_exit", "uniform", "random_weights")
    for line in published(Path("docs/results/campaign.csv"), ("mlm_15", "electra"), others):
        assert line in text
