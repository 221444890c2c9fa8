"""What makes AltMoEModel a transformers model: initial weights, saving, loading.

Comes in: a configuration, a folder or a Hub repository. Goes out: a model with certain weights, or an error that says
what is missing: nothing random is ever loaded silently. A checkpoint holds the connector, its statistics and LoRA
weights; encoders stay in their own repositories unless `self_contained=True`.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from .attaching_altmoe import known_weights, load_encoder, load_lora, save_encoder_parts
from .configuration_altmoe import AltMoEConfig
from .connector_altmoe import AltMoEConnector, AltMoEExperts, AltMoERouter, ClosedFormBase, Frame, ScoreBank
from .sentence_altmoe import write_sentence_files
from .sharing_altmoe import is_folder, refuse_local_encoders, upload_saved, usual_mode, without_paths

HUB_KEYWORDS = ("token", "cache_dir", "local_files_only", "force_download", "trust_remote_code")


class AltMoEPreTrainedModel(PreTrainedModel):
    """Weights' initialisation and what transformers wants to know of the class."""

    config_class = AltMoEConfig
    base_model_prefix = ""
    _no_split_modules = ["AltMoEExperts"]
    _supports_sdpa = True
    _supports_flash_attn = True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for the decorator in this file only; the experts live in connector_altmoe.py

    @torch.no_grad()
    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, AltMoEExperts):
            init.normal_(module.gate_up_proj, std=module.gate_up_proj.shape[-1] ** -0.5)
            init.normal_(module.down_proj, std=module.down_proj.shape[-1] ** -0.5)
        elif isinstance(module, AltMoERouter):
            for parameter in (module.weight, module.source_embedding, module.target_embedding):
                init.normal_(parameter, std=std)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, (Frame, ClosedFormBase, ScoreBank)):
            for name, buffer in module.named_buffers(recurse=False):
                (init.ones_ if name in ("scale", "gamma") else init.zeros_)(buffer)
        elif isinstance(module, AltMoEConnector):
            init.ones_(module.trust)
            if self.config.base != "none":
                for heads in module.heads.values():
                    for head in heads:
                        init.zeros_(head.weight)
        elif hasattr(module, "logit_scale"):  # the model itself
            init.constant_(module.logit_scale, -float(torch.tensor(self.config.temperature).log()))
            init.constant_(module.logit_bias, self.config.sigmoid_bias)

    # ---------------------------------------------------------------- save and load

    def save_pretrained(
        self, save_directory, self_contained: bool | None = None, state_dict=None, push_to_hub=False, **kwargs
    ):
        """Save connector, configuration, code and LoRA weights; encoders stay in their own repositories.

        Args:
            save_directory: folder to write.
            self_contained: also write every encoder (`encoder_<modality>/`), for machines without a Hub; None: those
                that came from such a checkpoint themselves.
            state_dict: weights to save instead of the model's own (as the Trainer passes them).
            push_to_hub, kwargs: as in `PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: if `self_contained` and an encoder is not attached, or if pushed and an encoder is neither
                written nor on the Hub.
        """
        before_saving, entries = self.config.encoders, self._saved_entries(self_contained)
        if push_to_hub:
            refuse_local_encoders(entries)
        os.makedirs(save_directory, exist_ok=True)
        before = self._get_files_timestamps(save_directory)
        self._describe_code()
        state_dict = self.state_dict() if state_dict is None else state_dict
        state_dict = {name: tensor for name, tensor in state_dict.items() if not name.startswith("encoders.")}
        state_dict = self.connector.as_saved(state_dict)
        self.config.encoders = entries
        hub = {k: kwargs.pop(k) for k in ("repo_id", "commit_message", "revision", "create_pr") if k in kwargs}
        private = kwargs.pop("private", None)
        try:
            super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        finally:
            self.config.encoders = before_saving
        if kwargs.get("is_main_process", True):
            save_encoder_parts(self.encoders, entries, save_directory)
            for place in ("", "encoder_*/", "adapter_*/"):
                usual_mode(Path(save_directory).glob(f"{place}*.safetensors"))
            if self._auto_class is not None:  # code is saved
                write_sentence_files(save_directory)
            if push_to_hub:
                upload_saved(self, save_directory, before, token=kwargs.get("token"), private=private, **hub)

    def _saved_entries(self, self_contained: bool | None) -> dict:
        """`config.encoders` as it is saved: which encoders go along, and no folder of this machine for those that do.

        Raises:
            ValueError: all are to go along, and one is not attached.
        """
        absent = [m for m in self.config.modalities if m not in self.encoders]
        if self_contained and absent:
            raise ValueError(f"self_contained=True needs the encoders of {absent}, which are not attached.")
        entries = {}
        for modality, entry in self.config.encoders.items():
            goes = entry.get("self_contained", False) if self_contained is None else self_contained
            goes = goes and modality not in absent
            entries[modality] = {**(without_paths(entry) if goes else entry), "self_contained": goes}
        return entries

    def push_to_hub(self, repo_id: str, *, self_contained: bool | None = None, **kwargs):
        """As in `PreTrainedModel.push_to_hub`; `self_contained` as in `save_pretrained`.

        Raises:
            ValueError: an encoder neither goes along nor has a Hub name at a pinned revision.
        """
        refuse_local_encoders(self._saved_entries(self_contained))
        self.save_pretrained = partial(type(self).save_pretrained, self, self_contained=self_contained)
        try:
            return super().push_to_hub(repo_id, **kwargs)
        finally:
            del self.save_pretrained

    def _describe_code(self) -> None:
        """Tell `config.json` which saved files serve `pipeline(...)` and the auto classes that pipelines load with."""
        if self._auto_class is None:
            return  # no code is saved
        # this import also makes transformers copy the pipeline's code beside the model's
        from .pipeline_altmoe import TASK, CrossModalRetrievalPipeline

        model, pipeline = (
            f"{cls.__module__.split('.')[-1]}.{cls.__name__}" for cls in (type(self), CrossModalRetrievalPipeline)
        )
        self.config.custom_pipelines = {TASK: {"impl": pipeline, "pt": ["AutoModel"]}}
        known = getattr(self.config, "auto_map", None) or {}
        self.config.auto_map = {**known, "AutoModel": model, "AutoModelForZeroShotImageClassification": model}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        load_encoders: bool | Sequence[str] = True,
        encoders=None,
        is_trainable=False,
        **kwargs,
    ):
        """Load connector and encoders.

        Args:
            pretrained_model_name_or_path: Hub repository or local folder.
            load_encoders: False loads the connector alone (enough for work on stored latents); names of modalities, only
                their encoders (enough to search stored latents with queries of these).
            encoders: `{modality: Hub name, local folder or loaded model}` instead of the recorded ones, whose weights
                they must have. A Hub name is recorded, so that the model can be saved and pushed by reference to it.
            is_trainable: LoRA weights may be trained on.
            kwargs: as in `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: foreign, truncated or incomplete checkpoint; an encoder that is not the recorded one.
            OSError: checkpoint or encoder not found.
        """
        name = pretrained_model_name_or_path
        hub = {key: kwargs[key] for key in HUB_KEYWORDS if kwargs.get(key) is not None}
        place = {**hub, **{key: kwargs[key] for key in ("revision", "subfolder") if kwargs.get(key)}}
        if not isinstance(kwargs.get("config"), PreTrainedConfig):
            is_folder(name, "a trained model", **{key: hub[key] for key in ("token", "cache_dir") if key in hub})
            fields, _ = PreTrainedConfig.get_config_dict(name, **place)
            if not fields:
                raise OSError(
                    f"'{name}' has no config.json: expected an altmoe checkpoint, a folder or a name on the Hub."
                )
            if fields.get("model_type") != cls.config_class.model_type:
                raise ValueError(
                    f"'{name}' holds a '{fields.get('model_type')}' model, not an altmoe checkpoint. "
                    "To use it as an encoder: AltMoEModel.from_encoders({modality: name})."
                )
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["use_safetensors"] = True  # a checkpoint of ours is never a pickle
        try:
            model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"The weights in '{name}' are damaged or truncated ({error}). Download or save the checkpoint again."
            ) from error
        missing = [key for key in info["missing_keys"] if not key.startswith("encoders.")]
        if missing or info["unexpected_keys"] or info.get("mismatched_keys"):
            raise ValueError(
                f"'{name}' is not a complete altmoe checkpoint: missing {sorted(missing)[:5]}, unexpected "
                f"{sorted(info['unexpected_keys'])[:5]}. Weights would be random; save the checkpoint again."
            )
        for parameter in [*model.parameters(), *model.buffers()]:
            # memory-mapped weights start at odd addresses, where matrix products may round differently
            parameter.data = parameter.data.clone()
        wanted = model.config.modalities if load_encoders is True else load_encoders or ()
        for modality in (*wanted, *(encoders or {})):
            model.config.latent_size(modality)
        for modality, entry in model.config.encoders.items():
            given = (encoders or {}).get(modality)
            if given is None and not (
                modality in wanted and (entry.get("self_contained") or entry.get("name_or_path"))
            ):
                continue
            encoder, commit = given, None
            if not isinstance(given, nn.Module):
                own = given is None and entry.get("self_contained")
                source = name if own else (given or entry["name_or_path"])
                where = {"subfolder": f"encoder_{modality}"} if own else {}
                revision = kwargs.get("revision") if own else (entry.get("revision") if given is None else None)
                encoder, commit = load_encoder(
                    source,
                    entry.get("protocol"),
                    config=entry.get("config"),
                    revision=revision,
                    what=f"{modality} encoder",
                    **where,
                    **hub,
                )
            pinned = given is None and commit and commit == entry.get("revision")  # a commit's content cannot change
            model.attach_encoder(modality, encoder, verify=not pinned)
            if commit and given is not None and known_weights(entry):
                entry.update(name_or_path=str(given), revision=commit)
            if entry.get("lora"):
                load_lora(encoder, name, modality, is_trainable, **{k: v for k, v in place.items() if k != "subfolder"})
        model.eval()
        return (model, info) if wants_info else model
