"""The `model.hsm` section: hierarchical shift mixing, every variant of its mixing function.

Owns the settings, which of them a variant uses, and the check of the shifts against the length of a row. Does not own how they are
computed (shift.py, mixing.py). Read by the layer (model/hsm/layer.py). Imports no torch.
"""

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from model.hsm.schedule import KIND, Hybrid, Schedule, Wrap, largest_num_shifts
from model.section import MixerSection, Place, Size

if TYPE_CHECKING:
    from model.cost import Cost
    from model.hsm.layer import HSM

Variant = Literal[
    "constant",
    "vector",
    "multihead",
    "matrix_scalar",
    "matrix",
    "multihead_matrix",
    "single_gate",
    "double_gate",
    "fusion",
]
Boundary = Literal["zero", "self", "clamp"]

# The settings of the mixing function, and who uses them. The rest of the section is everybody's.
_USES: dict[Variant, tuple[str, ...]] = {
    "constant": ("initial_a", "initial_b"),
    "vector": ("initial_a", "initial_b"),
    "multihead": ("num_heads", "head_shifts", "initial_a", "initial_b"),
    "matrix_scalar": ("initial_b", "bias"),
    "matrix": ("bias",),
    "multihead_matrix": ("num_heads", "head_shifts", "bias"),
    "single_gate": ("bias",),
    "double_gate": ("bias",),
    "fusion": ("hidden_dim", "activation", "bias"),
}
_SETTINGS = sorted({name for names in _USES.values() for name in names})
_REQUIRED = ("num_heads", "hidden_dim")


class HSMConfig(MixerSection):
    """Hierarchical shift mixing (arXiv 2601.22852, our reading: docs/hsm.md). null means the default named in the description."""

    variant: Variant = Field(default="constant", description="the mixing function, see docs/hsm.md")
    num_heads: Size | None = Field(default=None, description="multihead variants only: slices of the width")
    head_shifts: Literal["shared", "own"] | None = Field(
        default=None,
        description="multihead variants only; own: head h of layer l has the shift of layer l + h; null: shared",
    )
    hidden_dim: Size | None = Field(default=None, description="fusion only: its hidden width")
    activation: Literal["gelu", "relu"] | None = Field(default=None, description="fusion only; null: gelu")
    bias: bool | None = Field(default=None, description="of matrices, gates and fusion; null: true")
    initial_a: float | None = Field(default=None, description="factor of the token itself at the start; null: 0.5")
    initial_b: float | None = Field(default=None, description="factor of the shifted token at the start; null: 0.5")
    boundary: Boundary = Field(
        default="zero",
        description="what stands for a token before the document's first: zeros, the token itself, or the first",
    )
    num_shifts: Annotated[int, Field(ge=1, le=40)] | None = Field(
        default=None,
        description="distinct shifts 1, 2, 4 .. 2^(num_shifts - 1), then wrap; null: as many as layers, no wrap",
    )
    wrap: Wrap | None = Field(
        default=None, description="shifts beyond num_shifts: from 1 again, the largest, or any of them; null: repeat"
    )
    hybrid_shift: Hybrid = Field(
        default="compress",
        description="a layer of another mixer leaves its shift to the next hsm layer (compress) or out (skip)",
    )

    @model_validator(mode="after")
    def _the_variant_uses_what_is_set(self) -> Self:
        used = _USES[self.variant]
        for name in _SETTINGS:
            value = getattr(self, name)
            if value is not None and name not in used:
                users = ", ".join(variant for variant, names in _USES.items() if name in names)
                raise ValueError(
                    f"{name} is a setting of the variants {users}, but variant is {self.variant} and {name} is {value}: "
                    f"remove {name} (or set it to null) or choose another variant"
                )
            if value is None and name in used and name in _REQUIRED:
                raise ValueError(f"the variant {self.variant} needs {name}, but {name} is null: add {name}")
        if self.wrap is not None and self.num_shifts is None and self.head_shifts != "own":
            raise ValueError(
                f"wrap says what comes after num_shifts distinct shifts, but wrap is {self.wrap} and num_shifts is null (a shift for "
                "every layer): set num_shifts or remove wrap"
            )
        return self

    def shifts(self, mixers: tuple[str, ...], *, depth: int) -> tuple[int, ...]:
        """Shifts of the layer at `depth`: one per head where heads have their own, else one. `mixers`: every layer's kind."""
        schedule = Schedule(num_shifts=self.num_shifts, wrap=self.wrap or "repeat", hybrid=self.hybrid_shift)
        heads = self.num_heads if self.head_shifts == "own" else 1
        return tuple(schedule.shift(mixers, depth=depth, head=head) for head in range(heads or 1))

    def check_length(self, length: int, mixers: tuple[str, ...]) -> None:
        """ValueError where a layer would shift by a whole row of `length` tokens or more: it would never see another token.

        And where a setting of the schedule has nothing to act on in these layers.
        """
        if self.hybrid_shift == "skip" and set(mixers) == {KIND}:
            raise ValueError(
                "hybrid_shift says what layers of other mixers do to the schedule, but model.hsm.hybrid_shift is skip and model.mixers "
                "names hsm alone: remove hybrid_shift"
            )
        slots = len(mixers) if self.hybrid_shift == "skip" else mixers.count(KIND)
        if self.wrap is not None and self.head_shifts != "own" and slots <= (self.num_shifts or 0):
            raise ValueError(
                f"wrap says what comes after num_shifts layers, but model.hsm.wrap is {self.wrap}, num_shifts is {self.num_shifts} and "
                f"there are {slots} layers of hsm: remove wrap, or lower num_shifts"
            )
        for depth, kind in enumerate(mixers):
            largest = max(self.shifts(mixers, depth=depth)) if kind == KIND else 0
            if largest >= length:
                possible = largest_num_shifts(length)
                fewer = f"set model.hsm.num_shifts to {possible} or less, or " if possible else ""
                raise ValueError(
                    f"every shift must be below data.sequence_length, but layer {depth} of model.mixers shifts by {largest} and "
                    f"data.sequence_length is {length}: {fewer}raise data.sequence_length above {largest}"
                )

    def build(self, place: Place) -> "HSM":
        from model.hsm.layer import HSM

        return HSM(self, place)

    def cost(self, place: Place, *, length: int) -> "Cost":
        from model.hsm.cost import hsm_cost

        return hsm_cost(self, place, length=length)
