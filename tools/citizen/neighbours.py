"""Checks with other libraries: pipelines, the Trainer, accelerate, PEFT, sentence-transformers, ONNX."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from metro_megatron.hf.encoder_metro import MetroLayer
from metro_megatron.hf.modeling_metro import MetroForAuxiliaryMaskedLM
from tools.citizen.subject import NUM_LABELS, TEXTS, Checks, Subject, close, equal, require


def fill_mask(subject: Subject) -> str:
    """The auxiliary in the pipeline says what its logits say."""
    model = MetroForAuxiliaryMaskedLM.from_pretrained(subject.folder).eval()
    tokenizer = subject.tokenizer
    pipe: Any = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer)
    text = f"The plot is {tokenizer.mask_token}, but the actors carry it."
    encoded = tokenizer(text, return_tensors="pt")
    chance = model(**encoded).logits[encoded["input_ids"] == tokenizer.mask_token_id].softmax(-1)
    best, token = chance[0].topk(3)
    found = pipe(text, top_k=3)
    require([one["token"] for one in found] == token.tolist(), f"other tokens: {found}")
    return close(torch.tensor([one["score"] for one in found]), best)


def classification(subject: Subject) -> str:
    """The pipeline says what the logits say."""
    model = subject.classifier()
    pipe: Any = transformers.pipeline("text-classification", model=model, tokenizer=subject.tokenizer, top_k=None)
    chance = model(**subject.rows()).logits.softmax(-1)
    found = [
        [{one["label"]: one["score"] for one in text}[f"LABEL_{i}"] for i in range(3)] for text in pipe(list(TEXTS))
    ]
    return close(torch.tensor(found), chance)


def tagging(subject: Subject) -> str:
    """Every tagged token is its stretch of the text, and all of them are the whole text but for white space."""
    model = subject.load("AutoModelForTokenClassification", num_labels=NUM_LABELS)
    pipe: Any = transformers.pipeline("token-classification", model=model, tokenizer=subject.tokenizer)
    text = "Zoë paid  €5 in Ōsaka, 北京 🙂 (twice)."
    end = 0
    for one in pipe(text):
        is_next = not text[end : one["start"]].strip() and end <= one["end"]
        require(is_next, f"{one['word']!r} is said to be at {one['start']}:{one['end']}")
        piece = one["word"].replace("\u2581", " ").strip()
        is_bytes = piece.startswith("<0x")
        is_as_written = is_bytes or not subject.has_own_tokenizer  # others lower case, and mark pieces
        require(
            is_as_written or text[one["start"] : one["end"]].strip() == piece, f"{piece!r} is not at {one['start']}"
        )
        end = one["end"]
    require(end == len(text), f"ends at {end} of {len(text)}")
    return "offsets tile the text"


def answers(subject: Subject) -> str:
    """The best answer by the logits is a stretch of the context, padded or not."""
    model, tokenizer = subject.load("AutoModelForQuestionAnswering"), subject.tokenizer
    question, context = "Who carries the plot?", TEXTS[0]
    spans = []
    for settings in ({}, {"padding": "max_length", "max_length": 60}):
        encoded = tokenizer(question, context, return_offsets_mapping=True, return_tensors="pt", **settings)
        is_context = torch.tensor([part == 1 for part in encoded.sequence_ids()])
        offsets = encoded.pop("offset_mapping")[0]
        found = model(**encoded, p_mask=(~is_context).long()[None])
        score = found.start_logits[0, :, None] + found.end_logits[0]
        allowed = torch.ones_like(score).triu().bool() & is_context[:, None] & is_context
        first, last = divmod(int(score.masked_fill(~allowed, -torch.inf).argmax()), len(score))
        spans.append(context[offsets[first, 0] : offsets[last, 1]].strip())
    require(spans[0] == spans[1] != "", f"answers {spans}")
    return f"{spans[0][:30]!r} twice"


def features(subject: Subject) -> str:
    """The pipeline gives the hidden states."""
    model = subject.load()
    pipe: Any = transformers.pipeline("feature-extraction", model=model, tokenizer=subject.tokenizer)
    found = torch.tensor(pipe(TEXTS[0])[0])
    return close(found, model(subject.samples()[0][None]).last_hidden_state[0])


def sentence_transformers(subject: Subject) -> str:
    """Mean pooling of a batch with padding."""
    from sentence_transformers import SentenceTransformer

    found = SentenceTransformer(str(subject.folder), device="cpu").encode(list(TEXTS), convert_to_tensor=True)
    model = subject.load()
    means = [model(ids[None]).last_hidden_state[0].mean(0) for ids in subject.samples()]
    return close(found, torch.stack(means))


def trained(subject: Subject) -> str:
    """Trainer, accumulating two micro batches: the loss that is logged is the one of the whole batch."""
    model = subject.load("AutoModelForTokenClassification", num_labels=NUM_LABELS, hidden_dropout_prob=0.0,
                         attention_probs_dropout_prob=0.0)  # fmt: skip
    rows = subject.rows()
    labels = (rows["input_ids"] % NUM_LABELS).masked_fill(rows["attention_mask"] == 0, -100)
    examples = [{name: value[i] for name, value in {**rows, "labels": labels}.items()} for i in (0, 2)]
    batch = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
    expected = float(model(**batch).loss)
    return close(torch.tensor(_first_loss(subject, model, examples, 2)), torch.tensor(expected), 1e-4)


def pretrained_further(subject: Subject) -> str:
    """AutoModelForPreTraining with the collator of masked language modeling has a loss under the Trainer."""
    collator = transformers.DataCollatorForLanguageModeling(subject.tokenizer, mlm_probability=0.3)
    examples = [{"input_ids": ids.tolist()} for ids in subject.samples()]
    loss = _first_loss(subject, subject.load("AutoModelForPreTraining"), examples, 1, collator)
    require(0 < loss < float("inf"), f"loss {loss}")
    return f"loss {loss:.1f}"


def _first_loss(subject: Subject, model: Any, examples: list[Any], accumulation: int, collator: Any = None) -> float:
    """What the Trainer logs of its first step, on all examples in their order."""
    arguments = transformers.TrainingArguments(
        output_dir=str(subject.scratch / "trainer"),
        max_steps=1,
        per_device_train_batch_size=-(-len(examples) // accumulation),
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=examples, data_collator=collator)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return float(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))


def offload(kind: str) -> Any:
    """The check of one kind of offload: weights lie elsewhere, and come for each module's call."""

    def check(subject: Subject) -> str:
        import accelerate

        rows = subject.rows()
        for auto in ("AutoModel", "AutoModelForMaskedLM", "AutoModelForPreTraining"):
            others = {"noised_input_ids": rows["input_ids"]} if auto == "AutoModelForPreTraining" else {}
            expected = subject.load(auto)(**rows, **others).to_tuple()
            model, folder = subject.load(auto), str(subject.scratch / f"offload_{auto}")
            if kind == "cpu":
                model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
            elif kind == "disk":
                model = accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))
            else:
                places = {name: "disk" for name, module in model.named_modules() if type(module) is MetroLayer}
                for name, module in model.named_modules():
                    if list(module.parameters(recurse=False)) and ".layer." not in name:
                        places[name] = "cpu"
                model = subject.load(auto, device_map=places, offload_folder=folder)
            with torch.no_grad():
                for found, one in zip(model(**rows, **others).to_tuple(), expected, strict=True):
                    said = close(found, one)
        return f"AutoModel, main and pair: {said}"

    return check


def adapted(subject: Subject) -> str:
    """LoRA of every task: adapter and head are saved, and load to the same logits."""
    import peft

    tasks = {
        "AutoModelForQuestionAnswering": ("QUESTION_ANS", "start_logits"),
        "AutoModelForSequenceClassification": ("SEQ_CLS", "logits"),
        "AutoModelForTokenClassification": ("TOKEN_CLS", "logits"),
    }
    for auto, (task, output) in tasks.items():
        settings = peft.LoraConfig(task_type=task, target_modules=["query", "value"], r=4)
        model = peft.get_peft_model(subject.load(auto), settings)
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(str(subject.scratch / auto))
        torch.manual_seed(2)
        fresh = getattr(transformers, auto).from_pretrained(subject.folder, dtype=torch.float32)
        again = peft.PeftModel.from_pretrained(fresh, subject.scratch / auto).eval()
        rows = subject.rows()
        said = equal(getattr(again(**rows), output), getattr(model.eval()(**rows), output))
    return f"{len(tasks)} tasks, {said}"


def onnx(subject: Subject) -> str:
    """torch.export and onnxruntime, on rows of other shapes than it was exported with, padded on either side."""
    import onnxruntime

    model, path = subject.classifier(), subject.scratch / "model.onnx"
    _export(model, subject.rows(), path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for side in ("left", "right"):
        rows = {name: value[1:] if side == "left" else value.repeat(2, 1) for name, value in subject.rows(side).items()}
        found = session.run(None, {name: np.asarray(value) for name, value in rows.items()})[0]
        with torch.no_grad():
            said = close(torch.tensor(found), model(**rows).logits)
    return said


def _export(model: Any, rows: dict[str, Tensor], path: Path) -> None:
    """The attention is the default one."""
    require(model.config._attn_implementation == "sdpa", f"{model.config._attn_implementation} is the default")
    longest = model.config.max_position_embeddings
    shape = {0: torch.export.Dim("rows"), 1: torch.export.Dim("length", max=longest)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            kwargs=rows,
            dynamo=True,
            dynamic_shapes=dict.fromkeys(rows, shape),
            input_names=list(rows),
            verbose=False,
        )
    require(program is not None, "nothing was exported")
    program.save(path)  # type: ignore[union-attr]


NEIGHBOURS: Checks = {
    "pipeline fill-mask": fill_mask,
    "pipeline text-classification": classification,
    "pipeline token-classification": tagging,
    "question answering": answers,
    "pipeline feature-extraction": features,
    "sentence-transformers": sentence_transformers,
    "Trainer, accumulated": trained,
    "Trainer, pretraining": pretrained_further,
    "offload to CPU": offload("cpu"),
    "offload to disk": offload("disk"),
    "device_map": offload("map"),
    "PEFT": adapted,
    "ONNX": onnx,
}
