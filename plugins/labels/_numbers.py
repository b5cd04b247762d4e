"""What losses on numbers share."""

import kdkit


def check_width(name: str, student: kdkit.Outputs, context: kdkit.Context | None) -> None:
    """Check that the student gives as many numbers as a target has.

    Raises:
        ShapeError: it does not.
    """
    z_s = student.logits
    if z_s.ndim != 2 or (context is not None and z_s.shape[1] != context.outputs):
        wanted = f"(B, {context.outputs})" if context is not None else "(B, D)"
        raise kdkit.ShapeError(
            f"{name}: student answers {tuple(z_s.shape)} do not fit the targets, which need"
            f" {wanted}; give the student one output per number of the dataset"
        )
