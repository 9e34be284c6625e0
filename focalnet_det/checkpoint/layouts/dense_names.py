"""List the modules of dense detectors in mmdet's names and in ours.

Source: mmdet 2.11:mmdet/models/dense_heads/atss_head.py; SwinTransformer/
Swin-Transformer-Object-Detection:mmdet/models/dense_heads/reppoints_v2_head.py, necks/bifpn.py.
"""


def atss_subnets() -> dict[str, str]:
    """Return the rows of ATSS's convolutions, norms and activations, three entries of a list."""
    rows = {}
    for theirs, ours in (("cls_convs", "cls_subnet"), ("reg_convs", "bbox_subnet")):
        for i in range(4):
            rows[f"bbox_head.{theirs}.{i}.conv"] = f"head.{ours}.{3 * i}"
            rows[f"bbox_head.{theirs}.{i}.gn"] = f"head.{ours}.{3 * i + 1}"
    return rows


def reppoints_v2() -> dict[str, str]:
    """Return the rows of RepPoints v2, whose neck and head have the published names here."""
    blocks = [f"{name}_convs.{{i}}" for name in ("cls", "reg", "shared")]
    plain = ["cls_conv", "cls_out", "sem_out"]
    plain += [f"pts_{stage}_{part}" for stage in ("init", "refine") for part in ("conv", "out")]
    head = [f"{block}.{part}" for block in blocks for part in ("conv", "gn")]
    head += [f"reppoints_sem_embedding.{part}" for part in ("conv", "gn")]
    for corner in ("hem_tl", "hem_br"):
        head += [f"{corner}.{module}" for module in ("p_conv1", "p_gn1", "conv1", "gn1")]
        head += [
            f"{corner}.{block}.{part}"
            for block in ("p1_conv1", "p2_conv1", "conv2")
            for part in ("conv", "gn")
        ]
        plain += [f"{corner}_{part}_out" for part in ("score", "offset")]
    head += [f"reppoints_{name}" for name in plain]
    neck = [
        f"bi_fpn.{{i}}.{block}.{{j}}.{part}"
        for block in ("lateral_convs", "lateral_combine_conv", "out_combine_conv")
        for part in ("conv", "gn")
    ]
    return {
        **{f"neck.{name}": f"backbone.{name}" for name in neck},
        **{f"bbox_head.{name}": f"head.{name}" for name in head},
    }
