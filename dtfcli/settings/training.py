"""`training.*`, `lora.*` and `distill.*`: how long to train, and how."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from dtfcli.settings.group import Count, Group, Rate, Share, require, whole

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The projections of a backbone block. Routers, priors and predictors are trained in full, never adapted."""


def _check_betas(betas: list[float]) -> list[float]:
    remedy = "AdamW takes two numbers from 0 to below 1, such as [0.9, 0.95]"
    require(len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "betas", betas, remedy)
    return betas


def _check_targets(targets: list[str]) -> list[str]:
    unknown = ", ".join(name for name in targets if name not in LORA_TARGETS)
    remedy = f"{unknown} is not a projection of the backbone; choose from {', '.join(LORA_TARGETS)}"
    require(not unknown, "targets", targets, remedy)
    return targets


class LearningRates(Group):
    """`training.learning_rates.*`: the peak rate of each group of parameters."""

    base: Rate = Field(1e-5, description="The backbone.")
    prior: Rate = Field(1e-3, description="PriorFFN of decision layers (dtf by surprise).")
    forecast: Rate = Field(3e-3, description="Forecasts of routed layers (model.bypass = forecast).")
    router: Rate = Field(1e-2, description="Routers: DTF's score, MoD's linear score (routed blocks).")
    predictor: Rate = Field(1e-3, description="Routing predictors (model.predictor_loss_weight).")


class TrainingSettings(Group):
    """`training.*`: how long and how."""

    max_steps: Annotated[int, BeforeValidator(whole), Field(ge=0)] | None = Field(
        None,
        description="Optimizer steps; unset: as many as training.epochs takes; 0: only convert, fit and calibrate.",
    )
    epochs: Annotated[float, Field(gt=0)] = Field(1.0, description="Passes over the data when max_steps is unset.")
    micro_batch_size: Count = Field(8, description="Sequences per forward and backward on each process.")
    tokens_per_update: Count | None = Field(
        None, description="Tokens per optimizer step, over micro-batches and processes; unset: one micro-batch of each."
    )
    learning_rates: LearningRates = Field(default_factory=LearningRates, description="Peak learning rates.")
    weight_decay: Rate = Field(0.01, description="AdamW's weight decay, of weight matrices alone.")
    decay_router_scalars: bool = Field(
        False, description="Decay the routers too (DTF's scalars, MoD's linear score), as the thesis did."
    )
    betas: Annotated[list[float], AfterValidator(_check_betas)] = Field(
        default_factory=lambda: [0.9, 0.95], description="AdamW's two averaging coefficients."
    )
    warmup_ratio: Share = Field(0.01, description="Share of the steps over which the rates rise from 0.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the rates fall after warm-up; cosine and linear end at 0."
    )
    gradient_clip: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Largest norm of the gradient of a learning-rate group."
    )
    gradient_checkpointing: bool | Literal["selective"] = Field(
        False,
        description="Recompute activations in the backward pass to save memory: all (true), or all but the results of "
        "matrix products and attention (selective).",
    )
    compile: bool = Field(False, description="Compile each layer with torch.compile.")
    kernels: Literal["torch", "liger"] = Field(
        "torch",
        description="Library of norms, SwiGLU and GEGLU: torch, or on GPUs liger (pip install 'dtfcli[liger]').",
    )
    sharding: Literal["ddp", "fsdp2"] = Field(
        "ddp",
        description="With several processes: ddp (each holds the whole model) or fsdp2 (each holds a part of it).",
    )
    eval_every: Count | None = Field(None, description="Steps between evaluations; unset: about ten over the run.")
    log_every: Count = Field(10, description="Steps between lines of metrics.jsonl.")
    checkpoint_every: Count | None = Field(
        None, description="Steps between checkpoints; unset: about ten over the run."
    )
    keep_checkpoints: Count = Field(2, description="How many checkpoints are kept.")
    calibration_tokens: Count = Field(16384, description="Training tokens that calibrate the thresholds at the end.")
    threshold_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="Last share of the steps that route by threshold, as inference does, instead of by top-K."
    )
    capacity_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="How γ falls from capacity_start to model.capacity; constant: model.capacity throughout.",
    )
    capacity_start: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="γ of the first step under a capacity_schedule."
    )
    capacity_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        0.3, description="First share of the steps over which capacity_schedule runs."
    )
    fit_tokens: Annotated[int, BeforeValidator(whole), Field(ge=0)] | None = Field(
        None,
        description="Training tokens that fit forecasts and predicted scores by least squares before the first step; "
        "unset: 32 for each unit of the hidden size, 0: none.",
    )

    @model_validator(mode="after")
    def _check_together(self) -> "TrainingSettings":
        one = not (self.compile and self.kernels == "liger")
        require(one, "kernels", self.kernels, "compile = true fuses the same operations; choose one of the two")
        fraction, left = self.capacity_fraction, 1 - self.threshold_fraction
        remedy = (
            f"γ must have arrived where thresholds take over (threshold_fraction = {self.threshold_fraction:g}); "
            f"at most {left:g}"
        )
        arrives = self.capacity_schedule == "constant" or fraction <= left + 1e-9
        require(arrives, "capacity_fraction", fraction, remedy)
        return self


class LoraSettings(Group):
    """`lora.*`: adapt the backbone by low-rank matrices; routers, priors and predictors are trained in full."""

    enabled: bool = Field(False, description="Freeze the backbone and train low-rank adapters of its projections.")
    r: Count = Field(16, description="Rank of the adapters.")
    alpha: Count = Field(32, description="Adapters are scaled by alpha / r.")
    dropout: Share = Field(0.05, description="Dropout in front of the adapters.")
    targets: Annotated[list[str], AfterValidator(_check_targets)] = Field(
        default_factory=lambda: list(LORA_TARGETS),
        min_length=1,
        description="Projections of the backbone's blocks that get adapters; the default takes all, by any name.",
        examples=['["q_proj", "v_proj"]'],
    )
    quantize: Literal["none", "nf4"] = Field(
        "none",
        description="Hold the frozen projections in 4 bits while training (QLoRA): nf4 needs dtfcli[qlora]; saved "
        "adapters fit the base without quantization.",
    )
    merge: bool = Field(False, description="Also write merged_model/: the final model with its adapters merged in.")


class DistillSettings(Group):
    """`distill.*`: also learn from the dense parent, the base before it was routed."""

    enabled: bool = Field(False, description="Add the divergence from the dense parent's predictions to the loss.")
    weight: Rate = Field(1.0, description="Weight of KL(parent ‖ model).")
    lm_weight: Rate = Field(1.0, description="Weight of the language-model loss; 0: the parent alone teaches.")
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="T: both distributions are softened by it, and the divergence is scaled by T²."
    )
