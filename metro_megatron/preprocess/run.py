"""Documents to datasets of token ids: chunks to parts by workers, parts to shards, then the manifest.

The bytes written depend on inputs, tokenizer and `PlanOptions` only. A run that was interrupted goes on where it was
when the same command is given again.
"""

from pathlib import Path

from metro_megatron.cli.options import flatten, options_of, out_of_range
from metro_megatron.errors import UserError
from metro_megatron.preprocess.options import PlanOptions, PreprocessOptions
from metro_megatron.preprocess.output import explained
from metro_megatron.preprocess.source_run import SourceRun, Summary
from metro_megatron.text.inputs import InputFile, find_inputs
from metro_megatron.tokenizer.tokenizer import Tokenizer

__all__ = ["PlanOptions", "PreprocessOptions", "Summary", "preprocess"]


def preprocess(options: PreprocessOptions) -> list[Summary]:
    """Write a dataset for every source of the inputs.

    Raises UserError if an input or the tokenizer cannot be read, the output cannot be written, no document is found, or
    too many records are rejected (any at all if `strict`); what was encoded stays in the work folder.
    """
    _check_options(options)
    by_source: dict[str, list[InputFile]] = {}
    for file in find_inputs(options.input):
        by_source.setdefault(file.source, []).append(file)
    if len(by_source) > 1 and "{source}" not in options.output_prefix:
        raise UserError(
            f"--output_prefix {options.output_prefix}: there are {len(by_source)} sources ({', '.join(by_source)}); "
            "write {source} where their names belong"
        )
    tokenizer = Tokenizer.from_folder(options.tokenizer)
    runs = [SourceRun(options, tokenizer, source, files) for source, files in by_source.items()]
    for run in runs:
        with explained(run.prefix):
            run.check_output()
    return [run.run() for run in runs]


def _check_options(options: PreprocessOptions) -> None:
    plan = options.plan
    known = {option.leaf: option for option in options_of(PreprocessOptions)}
    problems = out_of_range(known, flatten(options), prefix="--")
    if not problems and plan.shard_index >= plan.num_shards:
        problems.append(
            f"--shard_index {plan.shard_index}: must lie between 0 and {plan.num_shards - 1}, one below --num_shards"
        )
    if not plan.text_key or len(set(plan.text_key)) < len(plan.text_key):
        problems.append(f"--text_key {' '.join(plan.text_key)}: name one key or several different ones")
    if Path(options.tokenizer).is_file():
        problems.append(f"--tokenizer {options.tokenizer} is a file; name the folder that holds it")
    if problems:
        raise UserError(problems)
