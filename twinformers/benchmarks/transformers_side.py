"""transformers' own model on the same folder, in every way that it offers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch

from twinformers.benchmarks.cases import Case
from twinformers.benchmarks.torch_side import OnTorch


class TransformersSide(OnTorch):
    """`variant`: eager attention; the fused one ("sdpa"); that with a static cache; that compiled as well."""

    framework = "transformers"

    def release(self) -> None:
        self._models: dict[str, Any] = {}
        self._compiled: Callable[..., Any] | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        super().release()

    def read(self, dtype: str, decoding: bool) -> Any:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            self.source, dtype=getattr(torch, dtype), attn_implementation="eager", local_files_only=True
        )
        model.generation_config.eos_token_id = None  # every run is as long as the case says
        model.generation_config.pad_token_id = 0
        return model.to(self.device).eval()

    def using(self, variant: str) -> Any:
        """A model of its own for each variant, which shares the weights: what one is told, no other sees."""
        if variant not in self._models:
            tensors = itertools.chain(self.model.parameters(), self.model.buffers())
            model = copy.deepcopy(self.model, {id(x): x for x in tensors})
            model.set_attn_implementation("eager" if variant == "eager" else "sdpa")
            self._models[variant] = model
        return self._models[variant]

    @torch.inference_mode()
    def decode(self, case: Case, variant: str, count: int) -> list[list[int]]:
        options: dict[str, Any] = {"max_new_tokens": count, "do_sample": False}
        if variant in ("static", "compile"):
            options |= {"cache_implementation": "static", "disable_compile": variant == "static"}
        if variant == "compile":
            from transformers import CompileConfig

            options["compile_config"] = CompileConfig(mode=self._mode)
            options["compile_config"]._compile_all_devices = True
        ids = torch.from_numpy(self.prompts(case)).to(self.device)
        tokens = self.using(variant).generate(ids, attention_mask=torch.ones_like(ids), **options)
        return tokens[:, case.tokens :].T.tolist()

    @property
    def _mode(self) -> str:
        # Graphs of kernels are CUDA's.
        return "reduce-overhead" if self.device.type == "cuda" else "default"

    @torch.inference_mode()
    def prefill(self, case: Case, variant: str) -> list[list[int]]:
        ids = torch.from_numpy(self.prompts(case)).to(self.device)
        # Below `generate`, which would only add to it; the head for the last position alone, as in the twins.
        logits = self._called(variant)(ids, use_cache=True, logits_to_keep=1).logits  # [B, 1, V]
        return logits.argmax(-1).T.tolist()

    def _called(self, variant: str) -> Callable[..., Any]:
        model = self.using(variant)
        if variant != "compile":
            return model
        if self._compiled is None:
            self._compiled = torch.compile(model)
        return self._compiled

    def trainer(self, case: Case, variant: str) -> Callable[[], float]:
        model, call = self.using(variant), self._called(variant)
        ids = torch.from_numpy(self.prompts(case)).to(self.device)
        if self._optimizer is None:  # the variants share the weights, so one is enough
            self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1, fused=True)
        optimizer, kind = self._optimizer, getattr(torch, self.dtype)

        def update() -> float:
            with torch.autocast(self.device.type, kind, enabled=self.narrow):
                loss = call(ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return update

    def encode(self, text: str) -> list[int]:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.source, local_files_only=True)(text).input_ids

    @torch.inference_mode()
    def continued(self, ids: list[int]) -> int:
        x = torch.tensor([ids], device=self.device)
        return int(self.using("sdpa").generate(x, max_new_tokens=1, do_sample=False)[0, -1])
