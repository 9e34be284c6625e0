"""The two published conventions of DINO, of which no shape of a tensor tells all."""

from dataclasses import dataclass

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class DINOConventions:
    """How a library fixes what the paper leaves open.

    Attributes:
        temperature, offset: of the encoder's position encoding; see `SinePositionEncoding`. With
            another temperature, boxes of trained weights move by up to 0.7 of the image.
        box_noise: scale of the noise on the boxes of denoising queries.
        shared_heads: whether all decoder layers have the same class layer and the same box layers.
        spare_labels: rows of the label embedding that no class has.
        title: of the library, for messages.
    """

    temperature: float
    offset: float
    box_noise: float
    shared_heads: bool
    spare_labels: int
    title: str


# Both read the padding mask in evaluation, which detrex leaves out: without padding, as in batches
# of one image, that is the same.
CONVENTIONS = {
    # FocalNet/FocalNet-DINO:config/DINO/DINO_4scale_focalnet_large_fl3.py, models/dino/dino.py.
    "focalnet_dino": DINOConventions(
        temperature=20.0,
        offset=0.0,
        box_noise=0.4,
        shared_heads=True,
        spare_labels=1,
        title="FocalNet-DINO",
    ),
    # IDEA-Research/detrex:projects/dino/configs/models/dino_r50.py, projects/dino/modeling/dino.py.
    "detrex": DINOConventions(
        temperature=10_000.0,
        offset=-0.5,
        box_noise=1.0,
        shared_heads=False,
        spare_labels=0,
        title="detrex",
    ),
}
DEFAULT = "detrex"


def conventions_by_temperature(temperature: float) -> str:
    """Return the conventions, a key of ``CONVENTIONS``, of weights with a temperature.

    Raises: ValueError if none has it.
    """
    for name, row in CONVENTIONS.items():
        # Half precision rounds it.
        if abs(row.temperature - temperature) <= 0.01 * row.temperature:
            return name
    known = ", ".join(f"{row.temperature:g} ({name})" for name, row in CONVENTIONS.items())
    raise ValueError(f"No DINO has a position encoding of temperature {temperature:g}: {known}.")
