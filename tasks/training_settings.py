"""What to train and how: the settings of a training run, checked where they are built."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

import pydantic

from tasks.checkpoints import architecture_family
from tasks.measurement import Settings

Network = Literal["mlp", "lenet", "vgg11", "vit", "timm"]
PositiveInt = Annotated[int, pydantic.Field(ge=1)]
PositiveFloat = Annotated[float, pydantic.Field(gt=0)]

# Settings that only some networks have, with their defaults. The MLP's are the paper's; the vision
# transformer's (about 68,000 parameters on 28×28) were chosen to train in minutes on one core.
NETWORK_DEFAULTS: dict[str, dict[str, Any]] = {
    "mlp": {"width": 500, "depth": 3, "activation": "relu"},
    "lenet": {},
    "vgg11": {},
    "vit": {
        "width": 48, "depth": 3, "heads": 3, "patch_size": 7, "mlp_ratio": 2.0, "dropout": 0.0,
    },
    "timm": {"architecture": None, "img_size": None, "model_args": None},
}  # fmt: skip
OPTIMIZER_DEFAULTS: dict[str, dict[str, Any]] = {
    "sgd": {"learning_rate": 0.1, "momentum": 0.0},  # the paper's
    "adamw": {"learning_rate": 1e-3},
}


class TrainSettings(Settings):
    """Settings of one training run.

    Fields that belong to a network or an optimizer are filled with its defaults and refused for
    the others, where they are None.

    Attributes:
        network: ``"mlp"``, ``"lenet"``, ``"vgg11"`` (the paper's), ``"vit"`` (timm's class, small)
            or ``"timm"``: any architecture of timm.
        width: Hidden units of the mlp, embedding dimension of the vit.
        depth: Hidden layers of the mlp, blocks of the vit.
        heads: Attention heads of the vit; divides ``width``.
        patch_size: Pixels of a patch of the vit; divides the image size.
        mlp_ratio: Hidden units of the vit's blocks in units of ``width``.
        dropout: Dropout probability of the vit in training.
        activation: Of the mlp.
        architecture: timm's name, without a tag; for ``"timm"`` only, and required there.
        img_size: Pixels that the images are resized to; None for the images as they are.
        model_args: Further keyword arguments of the architecture.
        loss: ``"cross_entropy"``, or the mean over outputs of the squared error of the logits
            (``"mse"``) or of their sigmoids (``"sigmoid_mse"``) from one-hot labels.
        optimizer: ``"sgd"`` or ``"adamw"``.
        learning_rate: Peak learning rate.
        momentum: Of sgd.
        weight_decay: Of the optimizer, on every parameter.
        schedule: After warm-up: ``"constant"``, or ``"cosine"`` down to zero.
        warmup_steps: Updates over which the learning rate rises linearly.
        batch_size: Images per update.
        steps: Number of updates.
        train_samples: Number of training images, drawn by the seed; None for all.
        eval_every: Updates between evaluations of the history; 0 for none.
        eval_samples: Images of each set that the history evaluates; the final values use all.
        seed: Initialisation, choice of training images and shuffling.
    """

    version: ClassVar[int] = 1  # bump it when equal settings give other weights

    network: Network
    width: PositiveInt | None = None
    depth: PositiveInt | None = None
    heads: PositiveInt | None = None
    patch_size: PositiveInt | None = None
    mlp_ratio: PositiveFloat | None = None
    dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] | None = None
    activation: Literal["relu", "tanh"] | None = None
    architecture: str | None = None
    img_size: PositiveInt | None = None
    model_args: dict[str, Any] | None = None
    loss: Literal["cross_entropy", "mse", "sigmoid_mse"] = "cross_entropy"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: PositiveFloat = 0.1
    momentum: Annotated[float, pydantic.Field(ge=0, lt=1)] | None = None
    weight_decay: Annotated[float, pydantic.Field(ge=0)] = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: Annotated[int, pydantic.Field(ge=0)] = 0
    batch_size: PositiveInt = 64
    steps: PositiveInt = 1000
    train_samples: PositiveInt | None = None
    eval_every: Annotated[int, pydantic.Field(ge=0)] = 100
    eval_samples: PositiveInt = 1000
    seed: int = 0

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {key: value for key, value in data.items() if value is not None}
        network: Any = NETWORK_DEFAULTS.get(data.get("network", ""), {})
        optimizer: Any = OPTIMIZER_DEFAULTS.get(data.get("optimizer", "sgd"), {})
        return {**network, **optimizer, **given}

    @pydantic.model_validator(mode="after")
    def _refuse_irrelevant(self) -> Self:
        owners = ((self.network, NETWORK_DEFAULTS), (self.optimizer, OPTIMIZER_DEFAULTS))
        for owner, table in owners:
            for key in sorted({key for fields in table.values() for key in fields}):
                if key not in table[owner] and getattr(self, key) is not None:
                    users = ", ".join(name for name, fields in table.items() if key in fields)
                    raise ValueError(f"{key} has no meaning for {owner!r} (only for {users})")
        if self.network == "timm":
            if self.architecture is None:
                raise ValueError("network = 'timm' needs architecture = \"a name of timm's\"")
            architecture_family(self.architecture)
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps} must be below steps = {self.steps}"
            )
        return self

    @property
    def family(self) -> str:
        """Family of its checkpoints unless somebody names another: timm's module, or network."""
        return architecture_family(self.architecture) if self.architecture else self.network

    def network_args(self) -> dict[str, Any]:
        """The fields that belong to the network, by the names of ``tasks.networks``."""
        return {key: getattr(self, key) for key in NETWORK_DEFAULTS[self.network]}

    def key_fields(self) -> dict[str, Any]:
        """The settings that determine the weights and the rows, defaults filled in."""
        fields = self.model_dump(mode="json")
        if self.network != "timm":  # keys are older than these settings, which mean nothing here
            fields = {k: v for k, v in fields.items() if k not in NETWORK_DEFAULTS["timm"]}
        return {"task": "training", "version": self.version, **fields}
