"""The runner in C: a PPM picture in, classes out, beside the package's C code of the student."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path

from understudy.export.c_text import c_string
from understudy.package.manifest import ArtifactEntry

RUNNER_FOLDER = "run_c"
MAIN_NAME = f"{RUNNER_FOLDER}/main.c"
TEMPLATES_FOLDER = Path(__file__).parent / "templates"


def runner_files(
    artifact: ArtifactEntry, *, image_shape: tuple[int, int, int], class_names: Sequence[str]
) -> dict[str, str]:
    """Return the runner's sources, name in the package to text.

    Args:
        artifact: holds ``student.h`` with
            ``int understudy_classify(const float *pixels_chw, size_t num_pixels, float *logits,
            size_t num_logits)``, which returns 0 when it worked, and ``student*.c`` behind it.
    """
    num_channels, height, width = image_shape
    names = ",\n    ".join(c_string(name) for name in class_names)
    header = (
        "/* What the student takes and returns. */\n"
        "#ifndef UNDERSTUDY_PACKAGE_H\n#define UNDERSTUDY_PACKAGE_H\n\n"
        f"#define NUM_CHANNELS {num_channels}\n#define HEIGHT {height}\n#define WIDTH {width}\n"
        f"#define NUM_CLASSES {len(class_names)}\n\n"
        f"static const char *const CLASS_NAMES[NUM_CLASSES] = {{\n    {names}\n}};\n\n#endif\n"
    )
    # An artifact may hold programs and board files of its own, each with another main.
    names_in_c = [name for name in artifact.files if fnmatch.fnmatchcase(name, "student*.c")]
    sources = " ".join(f"$(STUDENT)/{name}" for name in names_in_c)
    makefile = (TEMPLATES_FOLDER / "Makefile.in").read_text()
    makefile = makefile.replace("@STUDENT@", f"../{artifact.folder}")
    return {
        MAIN_NAME: (TEMPLATES_FOLDER / "main.c").read_text(),
        f"{RUNNER_FOLDER}/package.h": header,
        f"{RUNNER_FOLDER}/Makefile": makefile.replace("@SOURCES@", sources),
    }
