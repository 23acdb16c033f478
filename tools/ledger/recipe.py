"""What options, presets and files say of the paper's recipe: METRO Tables 1, 2 and 9 to 13."""

from typing import Any, get_args

from metro_megatron.cli.options import flatten
from metro_megatron.config.file import preset_names
from metro_megatron.finetune.recipe import Recipe
from metro_megatron.finetune.tasks import GlueName, SuperGlueName, benchmark
from metro_megatron.plan.memory import rank_memory
from tools.ledger.costs import gpu_hours
from tools.ledger.paper import number
from tools.ledger.rows import DIFFERS, EQUAL, NOT_RUN, SIZES, Row, Section, compared, load

BASELINE = ("base", "ablations/baseline.yaml")
FINETUNING = "the labelled sets, and five seeds of every task"
SCORES = {
    "accuracy": "accuracy",
    "macro-F1": "macro_f1",
    "Matthews": "mcc",
    "Pearson": "pearson",
    "Spearman": "spearman",
    "F1": "f1",
    "F1a": "f1a",
    "EM": "exact",
}
"""Metrics of the paper, and what ours are called."""
FORMS = {"classification": "classification", "regression": "regression", "ranking": "multiple_choice"}
"""Kinds of task likewise."""


def techniques(paper: dict[str, Any]) -> Section:
    """All sizes must have them."""
    rows = []
    for name, wanted in paper["table_1"].items():
        found = [compared(name, wanted, load(preset), "in METRO") for preset in SIZES]
        rows.append(next((row for row in found if row.verdict != EQUAL), found[0]))
    config = load("base")
    alone, among = (rank_memory(config, processes, 0).optimizer for processes in (1, 8))
    shards = f"the optimizer takes {alone / 1e9:.2f} GB on one rank, {among / 1e9:.2f} GB on each of 8"
    zero = Row("ZeRO optimizer", "in METRO, stage 1", shards, EQUAL if among * 8 <= alone * 1.001 else DIFFERS)
    note = "The options of all five presets. Fused kernels run on GPUs; on the CPU plain torch does the same."
    return Section("Table 1: techniques", [*rows, zero], note=note)


def ablations(paper: dict[str, Any]) -> Section:
    rows = []
    for name, said in paper["table_2"].items():
        file = f"ablations/{said['file']}.yaml"
        files = [said["file"]] if said["file"] in preset_names() else [*BASELINE, file]
        needs = f"{NOT_RUN}: {gpu_hours(load(*files))}"
        rows.append(Row(name, said["paper"], f"`{files[-1]}`", needs))
    last = load(*BASELINE, "ablations/combo_5_constrained_sharing.yaml")
    same = EQUAL if last == load("base") else DIFFERS
    rows.append(Row("The last row is METRO-LM base", "section 3.2.3", "all options of `base`", same))
    command = (
        "torchrun ... pretrain_metro.py --config base examples/ablations/baseline.yaml examples/ablations/clm.yaml"
    )
    note = (
        "MNLI-m/mm, averages of the large and of all GLUE tasks, SQuAD 2.0 EM/F1. Every row is a configuration without "
        f"problems that the trainer takes; all need Wikipedia and BookCorpus beside the hours, {FINETUNING}."
    )
    return Section("Table 2: base models", rows, command, note)


def glue(paper: dict[str, Any]) -> Section:
    return _tasks("Table 9: GLUE", paper["table_9"], list(get_args(GlueName)))


def superglue(paper: dict[str, Any]) -> Section:
    note = "Texts are formed as in Appendix A: docs/finetune.md."
    return _tasks("Table 10: SuperGLUE", paper["table_10"], list(get_args(SuperGlueName)), note)


def _tasks(title: str, said: dict[str, list[str]], names: list[Any], note: str = "") -> Section:
    """The tasks of a benchmark, whose names here are `names`."""
    rows = []
    for name, (kind, metrics) in said.items():
        bare = name.lower().replace("-", "")
        ours = next(one for one in names if one.removeprefix("superglue_") == bare)
        task = benchmark(ours)
        missing = [metric for metric in metrics.split() if SCORES[metric] not in task.scores]
        differs = [f"is {task.task.name}"] if task.task.name != FORMS[kind] else []
        differs += [f"no {', '.join(missing)}"] if missing else []
        verdict = f"{DIFFERS}: {'; '.join(differs)}" if differs else EQUAL
        rows.append(Row(name, f"{kind}, {metrics}", f"`{ours}`: {task.task.name}, {', '.join(task.scores)}", verdict))
    return Section(title, rows, "python tools/finetune.py --task TASK --data DIR", note)


def finetuning(paper: dict[str, Any]) -> Section:
    """Whether the defaults are among what the paper tries at base size."""
    recipe = Recipe()
    ours = {
        "Dropout of task layer": load("base").model.hidden_dropout,
        "Warmup steps": recipe.warmup_steps,
        "Learning rates": recipe.learning_rate,
        "Batch size": recipe.batch_size,
        "Weight decay": recipe.weight_decay,
        "Maximum training epochs": recipe.epochs,
        "Gradient clipping": recipe.clip_grad,
    }
    rows = []
    for name, sizes in paper["table_11"].items():
        tried = [number(one) for one in sizes[0].split(", ")]
        fits = ours[name] <= tried[0] if name.startswith("Maximum") else ours[name] in tried
        printed = "; ".join(dict.fromkeys(sizes))
        rows.append(Row(name, printed, f"{ours[name]:g}", EQUAL if fits else DIFFERS))
    note = (
        "Paper: base, base++; then other values of larger sizes. Here: the defaults, which are one of those at base "
        "size; all are options. The learning rate decays linearly in both."
    )
    return Section("Table 11: fine-tuning", rows, "python tools/finetune.py --help", note)


def corpora(paper: dict[str, Any]) -> Section:
    rows = [
        Row(name, "in METRO-LM's 160 GB", "docs/corpora.md", f"{NOT_RUN}: {needs}")
        for name, needs in paper["table_12"].items()
    ]
    return Section("Table 12: corpora", rows, "the commands in docs/corpora.md")


def pretraining(paper: dict[str, Any]) -> Section:
    rows = []
    for name, values in paper["table_13"].items():
        for (preset, size), printed in zip(SIZES.items(), values, strict=True):
            wanted = type(flatten(load(preset))[name])(number(printed))
            rows.append(compared(f"{size}: {name}", {name: wanted}, load(preset), str(printed)))
    different = [row for row in rows if row.verdict != EQUAL]
    same = f"{len(rows) - len(different)} of {len(rows)}"
    rows = [Row("all values of five sizes", f"{len(rows)} numbers", f"{same} equal", DIFFERS if different else EQUAL)]
    note = ", ".join(f"`{name}`" for name in paper["table_13"])
    return Section("Table 13: pretraining", [*rows, *different], note=f"Compared: {note}.")
