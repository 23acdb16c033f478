"""METRO-LM for transformers: the classes that an exported folder loads as, and what tests compare with.

Where a head and BERT's get the same call, they do the same: arguments and their order, losses, labels that are ignored.
token_type_ids are taken and mean nothing, as the model has no segments. What attention_mask and position_ids may be
says `encode` of `encoder_metro`.

Legend: B rows, S slots of a row, H hidden, D width of the token table, V vocabulary, C labels, A choices.
"""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    ModelOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .configuration_metro import MetroConfig
from .encoder_metro import SHARED_EMBEDDINGS, MetroAuxiliaryEncoder, MetroEmbeddings, MetroEncoder, encode, readable
from .heads_metro import (
    IGNORED,
    LANGUAGE_MODELS,
    MAIN_HEADS,
    MetroClassificationHead,
    MetroCLMHead,
    MetroMLMHead,
    check_labels,
    first_slots,
    first_states,
    num_labels,
    require,
    require_auxiliary,
    task_dropout,
    tied_weights,
)
from .positions_metro import MetroBiasTable, MetroPositionTable

logger = logging.get_logger(__name__)


class MetroPreTrainedModel(PreTrainedModel):
    """What all classes share. A saved file may hold the whole pair: parts that a class has no use for are skipped.

    Raises ImportError with transformers 4, which would start tied decoders at random.
    """

    config: MetroConfig
    config_class = MetroConfig
    base_model_prefix = "metro"
    supports_gradient_checkpointing = True
    # The Trainer divides a loss by the micro batches of a step, instead of handing over the step's number of labels.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _no_split_modules = ["MetroEmbeddings", "MetroLayer"]
    _keys_to_ignore_on_load_unexpected = [
        r"^auxiliary\.",
        r"^(auxiliary|rtd|clm|cloze|mlm|start|end)_head\.",
        r"^(classifier|qa_outputs)\.",
    ]

    def __init__(self, config: MetroConfig):
        if int(transformers.__version__.split(".")[0]) < 5:
            raise ImportError(
                f"METRO-LM's models need transformers 5, this is {transformers.__version__}, which would start tied "
                "decoders at random; pip install 'transformers>=5'"
            )
        super().__init__(config)

    def encode_main(self, *inputs: Tensor | None, **kwargs: Any) -> Any:
        """The BaseModelOutput of a head's inputs; no tuple, as config.return_dict is of what the head returns."""
        main: Any = self.metro
        return main(*inputs, **kwargs, return_dict=True)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            scale = getattr(module, "init_scale", 1.0)
            nn.init.normal_(module.weight, std=self.config.initializer_range * scale)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module.weight, "_is_hf_initialized", False):
                return
            if module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
            if isinstance(module, MetroPositionTable) and self.config.position_init == "zero":
                module.weight.zero_()
            if isinstance(module, MetroBiasTable) and module.config.relative_bias_init == "decay":
                module.weight.copy_(module.decaying())
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class MetroModel(MetroPreTrainedModel):
    """The main encoder."""

    _auto_class = "AutoModel"

    def __init__(self, config: MetroConfig):
        super().__init__(config)
        self.embeddings = MetroEmbeddings(config, is_auxiliary=False)
        self.encoder = MetroEncoder(config, is_auxiliary=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.set_submodule("embeddings.word_embeddings", value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """input_ids [B, S] or inputs_embeds [B, S, D] to hidden states [B, S, H]; attention_mask [B, S] or of pairs."""
        words = _words(self.embeddings.word_embeddings, input_ids, inputs_embeds)
        return encode(self, words, attention_mask, position_ids, **_outputs(kwargs))


def _words(table: nn.Module, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Token embeddings [B, S, D]."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds")
    return table(input_ids) if inputs_embeds is None else inputs_embeds


def _outputs(kwargs: dict[str, Any]) -> dict[str, bool | None]:
    """Of the arguments of a call, those that say what an encoder returns; the others are for losses."""
    return {name: kwargs.get(name) for name in ("output_hidden_states", "output_attentions")}


class MetroForMaskedLM(MetroPreTrainedModel):
    """The main encoder with its language modeling head: the original token at every position.

    Of METRO's pair it was pretrained on text in which plausible tokens stand where the auxiliary model guessed wrong,
    not on <mask>: give it text to correct, and `MetroForAuxiliaryMaskedLM` fills <mask>. A main encoder pretrained with
    "mlm" fills <mask> itself. Raises ValueError if main learned neither "clm" nor "mlm".
    """

    _auto_class = "AutoModelForMaskedLM"
    accepts_loss_kwargs = True

    def __init__(self, config: MetroConfig):
        super().__init__(config)
        self.metro = MetroModel(config)
        objective = require(config, *LANGUAGE_MODELS)
        self.head_name = f"{objective}_head"
        self.add_module(self.head_name, MAIN_HEADS[objective](config))
        self._tied_weights_keys = tied_weights(config.shared_embeddings, False, [objective])
        self.post_init()

    @property
    def head(self) -> MetroCLMHead:
        """Hidden states to logits."""
        return self.get_submodule(self.head_name)  # type: ignore[return-value]

    def get_output_embeddings(self) -> nn.Linear:
        return self.head.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.head.decoder = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits [B, S, V]; loss: mean over labels [B, S] other than -100. Warns of <mask> where main never saw it."""
        if self.head_name == "clm_head":
            self._warn_of_masks(input_ids)
        outputs = self.encode_main(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.head(outputs.last_hidden_state)
        return _language_model_output(self, logits, labels, outputs, kwargs)

    def _warn_of_masks(self, input_ids: Tensor | None) -> None:
        if input_ids is None or not readable(input_ids):
            return
        if bool((input_ids == self.config.mask_token_id).any()):
            auxiliary = "MetroForAuxiliaryMaskedLM of the same module loads the auxiliary encoder, which fills it"
            logger.warning_once(
                "The input holds <mask>, which the main encoder (MetroForMaskedLM) never saw in pretraining: it "
                f"corrects tokens. {auxiliary if self.config.num_auxiliary_layers else 'This model cannot fill it'}."
            )


def _language_model_output(
    model: MetroPreTrainedModel,
    logits: Tensor,
    labels: Tensor | None,
    outputs: BaseModelOutput,
    kwargs: dict[str, Any],
) -> MaskedLMOutput:
    """With the loss of transformers' masked language models, if there are labels [B, S]; logits [B, S, V]."""
    loss = None
    if labels is not None:
        check_labels(labels, model.config.vocab_size, "vocab_size")
        loss = model.loss_function(logits, labels, model.config.vocab_size, **kwargs)
    return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions)


class MetroForAuxiliaryMaskedLM(MetroPreTrainedModel):
    """The auxiliary encoder with its masked language modeling head: fills <mask>. Raises ValueError without one."""

    _auto_class = "AutoModelForMaskedLM"
    accepts_loss_kwargs = True
    _keys_to_ignore_on_load_unexpected = [r"^metro\.", r"^(rtd|clm|cloze)_head\."]

    def __init__(self, config: MetroConfig):
        super().__init__(config)
        require_auxiliary(config)
        self.loss_type = "ForMaskedLM"
        self._tied_weights_keys = tied_weights(config.shared_embeddings, config.shared_lm_bias, ["auxiliary"])
        # What it shares with the main model, under the names it has in the pair's file.
        shared = SHARED_EMBEDDINGS[config.shared_embeddings]
        self.words_name = f"{'metro' if shared else 'auxiliary'}.embeddings.word_embeddings"
        if shared:
            embeddings = MetroEmbeddings(config, is_auxiliary=False)
            parts = nn.ModuleDict({part: embeddings.get_submodule(part) for part in shared})
            self.metro = nn.ModuleDict({"embeddings": parts})
        if config.shared_lm_bias:
            bias = nn.ParameterDict({"bias": nn.Parameter(torch.zeros(config.vocab_size))})
            self.clm_head = nn.ModuleDict({"decoder": bias})
        self.auxiliary = MetroAuxiliaryEncoder(config)
        self.auxiliary_head = MetroMLMHead(config, is_auxiliary=True)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.get_submodule(self.words_name)

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.set_submodule(self.words_name, value)

    def get_output_embeddings(self) -> nn.Linear:
        return self.auxiliary_head.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.auxiliary_head.decoder = value
        if self.config.shared_lm_bias:  # it keeps the bias that the decoder is tied to
            self.get_submodule("clm_head.decoder").bias = nn.Parameter(value.bias.detach().clone())

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits [B, S, V]; loss: mean over labels [B, S] other than -100."""
        words = _words(self.get_input_embeddings(), input_ids, inputs_embeds)
        outputs = self.auxiliary(words, attention_mask, position_ids, **_outputs(kwargs))
        logits = self.auxiliary_head(outputs.last_hidden_state)
        return _language_model_output(self, logits, labels, outputs, kwargs)


class MetroForReplacedTokenDetection(MetroPreTrainedModel):
    """The main encoder with its replaced token detection head: sigmoid(logit) is the probability of "original".

    Raises ValueError if main did not learn "rtd".
    """

    _auto_class = "AutoModelForPreTraining"

    def __init__(self, config: MetroConfig):
        super().__init__(config)
        self.metro = MetroModel(config)
        self.rtd_head = MAIN_HEADS[require(config, "rtd")](config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Logits [B, S]; loss: mean over labels [B, S] (1 original, 0 replaced) other than -100 and not in padding."""
        outputs = self.encode_main(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.rtd_head(outputs.last_hidden_state).squeeze(-1)
        check_labels(labels, 2, "the number of labels")
        return TokenClassifierOutput(
            loss=None if labels is None else detection_loss(logits, labels, attention_mask),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def detection_loss(logits: Tensor, labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Mean binary cross-entropy of logits [B, S] over labels [B, S] other than -100 where attention_mask shows a token.

    The label 1 is of originals.
    """
    labels = labels.to(logits.device)
    is_labelled = labels != IGNORED
    if attention_mask is not None and attention_mask.dim() == 2:
        is_labelled = is_labelled & attention_mask.to(logits.device).bool()
    losses = functional.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")
    return losses.where(is_labelled, 0).sum() / is_labelled.sum()


def sampled_words(logits: Tensor, never: list[int]) -> Tensor:
    """A token drawn from the softmax of logits [B, S, V] without the ids `never`, at every position [B, S].

    By Gumbel's maximum, which needs one more tensor of that size: which positions are asked for says no shape.
    """
    # 0, whose logarithm is not finite, is drawn by some generators.
    noise = torch.empty_like(logits, dtype=torch.float32).exponential_().clamp_(min=torch.finfo(torch.float32).tiny)
    noise = noise.log_().neg_()
    noise[..., never] = -torch.inf
    return noise.add_(logits.detach()).argmax(-1)


@dataclass
class MetroForPreTrainingOutput(ModelOutput):
    """mlm_logits, clm_logits, cloze_logits [B, S, V]; rtd_logits, noised_input_ids [B, S]; main's last hidden state
    [B, S, H], and its hidden states and attentions if asked for; a loss where there are labels. None where there is no
    such head; mlm_logits are the auxiliary's, or main's if it learned "mlm"."""

    loss: Tensor | None = None
    mlm_logits: Tensor | None = None
    rtd_logits: Tensor | None = None
    clm_logits: Tensor | None = None
    cloze_logits: Tensor | None = None
    noised_input_ids: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class MetroForPreTraining(MetroPreTrainedModel):
    """All that was pretrained: main, the auxiliary if there is one, what they share, the heads of the objectives."""

    _auto_class = "AutoModelForPreTraining"

    def __init__(self, config: MetroConfig):
        super().__init__(config)
        self.metro = MetroModel(config)
        self.heads = [objective for objective in config.objectives if objective in MAIN_HEADS]
        everyone = [*(["auxiliary"] if config.num_auxiliary_layers else []), *self.heads]
        self._tied_weights_keys = tied_weights(config.shared_embeddings, config.shared_lm_bias, everyone)
        if config.num_auxiliary_layers:
            self.auxiliary = MetroAuxiliaryEncoder(config)
            self.auxiliary_head = MetroMLMHead(config, is_auxiliary=True)
        for objective in self.heads:
            self.add_module(f"{objective}_head", MAIN_HEADS[objective](config))
        self.post_init()

    def _resize_token_embeddings(
        self, new_num_tokens: int | None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """All decoders, and the auxiliary's own table; transformers knows of one of each."""
        words = super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        size = words.num_embeddings
        if self.config.num_auxiliary_layers and not SHARED_EMBEDDINGS[self.config.shared_embeddings]:
            own = self.auxiliary.embeddings
            own.word_embeddings = self._get_resized_embeddings(own.word_embeddings, size, mean_resizing=mean_resizing)
        for head in [module for module in self.modules() if isinstance(module, MetroCLMHead)]:
            head.decoder = self._get_resized_lm_head(head.decoder, size, mean_resizing=mean_resizing)
        return words

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        noised_input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> MetroForPreTrainingOutput:
        """All logits for masked input_ids [B, S] (the auxiliary's input) and noised_input_ids [B, S] (main's).

        Without noised_input_ids, every masked token is replaced by a word that the auxiliary model samples (torch's
        generator); if there is no auxiliary, main reads input_ids as they are. Masked are <mask>, or, if they are
        given, labels [B, S] other than -100: the originals. With labels there is METRO's loss (eq. 9), of weights
        rtd_weight and clm_weight of the configuration. Raises ValueError if it learned what needs more than that, and
        for inputs_embeds: masks and replacements are of ids.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("give input_ids, not inputs_embeds: the pair replaces ids; MetroModel takes either")
        is_masked = input_ids == self.config.mask_token_id if labels is None else labels != IGNORED
        check_labels(labels, self.config.vocab_size, "vocab_size")
        rows = {"attention_mask": attention_mask, "position_ids": position_ids}
        logits: dict[str, Any] = {}
        if self.config.num_auxiliary_layers:
            logits["mlm_logits"] = self.auxiliary_head(self.encode_auxiliary(input_ids, **rows))
        if noised_input_ids is None and "mlm_logits" in logits:
            samples = sampled_words(logits["mlm_logits"], self.config.unsampled_ids)
            noised_input_ids = torch.where(is_masked, samples, input_ids)
        elif noised_input_ids is None:
            noised_input_ids = input_ids
        outputs = self.encode_main(noised_input_ids, **rows, **_outputs(kwargs))
        hidden = outputs.last_hidden_state
        for objective in self.heads:
            said = self.get_submodule(f"{objective}_head")(hidden)
            logits[f"{objective}_logits"] = said.squeeze(-1) if objective == "rtd" else said
        found = MetroForPreTrainingOutput(**logits, noised_input_ids=noised_input_ids, **outputs)
        if labels is not None:
            found.loss = self._loss(found, torch.where(is_masked, labels, input_ids), is_masked, attention_mask)
        return found

    def encode_auxiliary(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """The auxiliary encoder's hidden states [B, S, H] of masked ids [B, S]."""
        owner = self.metro if SHARED_EMBEDDINGS[self.config.shared_embeddings] else self.auxiliary
        words = owner.embeddings.word_embeddings(input_ids)
        return self.auxiliary(words, attention_mask, position_ids).last_hidden_state

    def _loss(
        self,
        found: MetroForPreTrainingOutput,
        originals: Tensor,
        is_masked: Tensor,
        attention_mask: Tensor | None,
    ) -> Tensor:
        """Means over masked positions of both language models, and over all tokens of replaced token detection."""
        without = sorted(set(self.config.objectives) - {"rtd", "clm", "mlm"})
        if without:
            raise ValueError(
                f"this model learned {', '.join(without)}, whose loss needs more than labels; give no labels, and take "
                "the loss of the trainer"
            )
        targets = originals.masked_fill(~is_masked, IGNORED).flatten()
        weights = {"mlm": 1.0, "rtd": self.config.rtd_weight, "clm": self.config.clm_weight}
        losses = {}
        for name, logits in (("mlm", found.mlm_logits), ("clm", found.clm_logits)):
            if logits is not None:
                losses[name] = functional.cross_entropy(logits.flatten(0, 1).float(), targets.to(logits.device))
        if found.rtd_logits is not None:
            is_original = found.noised_input_ids.eq(originals).long()  # type: ignore[union-attr]
            losses["rtd"] = detection_loss(found.rtd_logits, is_original, attention_mask)
        return sum((weights[name] * loss for name, loss in losses.items()), torch.zeros((), device=targets.device))


class MetroForSequenceClassification(MetroPreTrainedModel):
    """The main encoder with a fresh classifier, or a regressor if num_labels is 1 or problem_type says so."""

    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: MetroConfig):
        super().__init__(config)
        self.metro = MetroModel(config)
        self.classifier = MetroClassificationHead(config, num_labels(config))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits [B, C]; loss of problem_type, which the first labels set as everywhere in transformers.

        C is 1: regression; integers [B]: one label; floats [B, C]: labels that are each true or not.
        """
        outputs = self.encode_main(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.classifier(first_states(outputs.last_hidden_state, attention_mask))
        loss = None
        if labels is not None:
            if self._is_single_label(labels):
                check_labels(labels, num_labels(self.config), "num_labels")
            loss = self.loss_function(labels, logits.float(), self.config, **kwargs)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _is_single_label(self, labels: Tensor) -> bool:
        problem_type = self.config.problem_type
        if problem_type is None:
            return num_labels(self.config) > 1 and not labels.is_floating_point()
        return problem_type == "single_label_classification"


class MetroForTokenClassification(MetroPreTrainedModel):
    """The main encoder with a fresh classifier of every token."""

    _auto_class = "AutoModelForTokenClassification"
    accepts_loss_kwargs = True

    def __init__(self, config: MetroConfig):
        super().__init__(config)
        self.metro = MetroModel(config)
        self.dropout = nn.Dropout(task_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, num_labels(config))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Logits [B, S, C]; loss: mean over labels [B, S] other than -100."""
        outputs = self.encode_main(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            check_labels(labels, num_labels(self.config), "num_labels")
            loss = self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class MetroForMultipleChoice(MetroPreTrainedModel):
    """The main encoder with a fresh scorer of <s>: the choice of the largest score is taken."""

    _auto_class = "AutoModelForMultipleChoice"

    def __init__(self, config: MetroConfig):
        super().__init__(config)
        self.metro = MetroModel(config)
        self.classifier = MetroClassificationHead(config, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MultipleChoiceModelOutput:
        """All inputs have A choices behind B: input_ids [B, A, S]. Logits [B, A]; loss: cross-entropy of labels [B]."""
        given = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        num_choices = next((x.size(1) for x in (input_ids, inputs_embeds) if x is not None), 1)
        flat = [None if x is None else x.flatten(0, 1) for x in given]
        outputs = self.encode_main(*flat, **kwargs)
        logits = self.classifier(first_states(outputs.last_hidden_state, flat[1])).view(-1, num_choices)
        check_labels(labels, num_choices, "the number of choices")
        return MultipleChoiceModelOutput(
            loss=None if labels is None else functional.cross_entropy(logits.float(), labels.to(logits.device)),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MetroForQuestionAnswering(MetroPreTrainedModel):
    """The main encoder with a fresh head for the first and the last token of an answer; <s> means no answer."""

    _auto_class = "AutoModelForQuestionAnswering"
    # Heads of two matrices, which this class once had, are not skipped: the loading report names them.
    _keys_to_ignore_on_load_unexpected = [r"^auxiliary\.", r"^(auxiliary|rtd|clm|cloze|mlm)_head\.", r"^classifier\."]

    def __init__(self, config: MetroConfig):
        super().__init__(config)
        self.metro = MetroModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        p_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Start and end logits [B, S]; loss: mean of both cross-entropies of slots [B]; those outside are ignored.

        With p_mask [B, S] (XLNet's), padding and where it is 1 (question, specials) get the lowest finite logit, <s>
        never does; answers there are ignored, too.
        """
        outputs = self.encode_main(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.qa_outputs(outputs.last_hidden_state)
        start, end = (side.squeeze(-1).contiguous() for side in logits.split(1, dim=-1))
        if p_mask is not None:
            impossible = _impossible(p_mask, attention_mask).to(start.device)
            start, end = (side.masked_fill(impossible, torch.finfo(side.dtype).min) for side in (start, end))
            start_positions, end_positions = (
                _ignore_impossible(positions, impossible) for positions in (start_positions, end_positions)
            )
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start.float(), end.float(), start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start,
            end_logits=end,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _impossible(p_mask: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Slots [B, S] that no answer begins or ends at."""
    impossible = p_mask == 1
    if attention_mask is not None and attention_mask.dim() == 2:
        impossible = impossible | (attention_mask == 0)
    slot = torch.arange(p_mask.size(1), device=p_mask.device)
    return impossible & (slot != first_slots(attention_mask))


def _ignore_impossible(positions: Tensor | None, impossible: Tensor) -> Tensor | None:
    """Slots [B] of answers; S, which the loss ignores, instead of those that are impossible."""
    if positions is None:
        return None
    length = impossible.size(1)
    positions = positions.flatten().clamp(0, length)
    is_impossible = impossible.gather(1, positions.clamp(max=length - 1)[:, None]).squeeze(1)
    return positions.masked_fill(is_impossible, length)
