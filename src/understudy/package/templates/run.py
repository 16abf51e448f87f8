"""Names the likeliest classes: python run.py PICTURE ... (numpy, pillow, onnxruntime)."""

import hashlib
import io
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

FORMATS = "AVIF BMP DIB GIF ICO JPEG JPEG2000 PNG PPM TIFF WEBP TGA".split()  # noqa: SIM905
PACKAGE = "the package", "the files of the manifest, unchanged. Get the package again."
PICTURE = "an intact picture of at most 50,000,000 pixels. Save it again as PNG or JPEG."
Image.MAX_IMAGE_PIXELS = 50_000_000
warnings.simplefilter("error", Image.DecompressionBombWarning)
sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
if len(sys.argv) < 2:
    print("usage: python run.py PICTURE ...", file=sys.stderr)
    sys.exit(2)
(given, expected), folder = PACKAGE, Path(__file__).resolve().parent
try:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    digest = manifest.pop("content_sha256")
    rest = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    if hashlib.sha256(rest.encode()).hexdigest() != digest:
        raise ValueError("manifest.json was changed")
    rows = [row for row in manifest["artifacts"] if row["target"] == "onnx"]
    row = max(rows, key=lambda row: row["folder"].endswith("/" + manifest["default_artifact"]))
    name = f"{row['folder']}/{row['opens']}"
    model = (folder / name).read_bytes()
    if hashlib.sha256(model).hexdigest() != manifest["files"][name]["sha256"]:
        raise ValueError(f"{name} was changed")
    session, names = onnxruntime.InferenceSession(model), manifest["class_names"]
    channels, height, width = manifest["preprocessing"]["image_shape"]
    mode, entry = "RGB" if channels == 3 else "L", session.get_inputs()[0].name
    stretched = manifest["preprocessing"]["resize"] == "stretch"
    resize = Image.Image.resize if stretched else ImageOps.fit  # the right size stays as it is
    Image.init()
    formats = [one for one in FORMATS if one in Image.OPEN]
    for path in sys.argv[1:]:
        given, expected = path, PICTURE
        data = Path(path).read_bytes()  # of a path itself Pillow turns some TIFF files wrongly
        image: Image.Image = Image.open(io.BytesIO(data), formats=formats)
        if image.format in ("JPEG", "MPO", "WEBP") or "exif" in image.info:
            image.getexif()  # of the header, before what follows the pixels
            image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("it has floating-point pixels, whose range is not known")
        if image.mode.startswith("I"):  # 16 bits
            values = np.asarray(image).astype(np.int64).clip(0, 65535)
            values[values == image.info.get("transparency", -1)] = 0
            image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
        elif image.has_transparency_data:
            black = Image.new("RGBA", image.size, "black")
            image = Image.alpha_composite(black, image.convert("RGBA"))
        image = resize(image.convert(mode), (width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(image, np.float32).reshape(1, height, width, channels) / 255
        given, expected = PACKAGE
        logits = session.run(None, {entry: pixels.transpose(0, 3, 1, 2)})[0][0]
        if logits.shape != (len(names),) or not np.isfinite(logits).all():
            raise ValueError(f"the network's answer is not {len(names)} finite numbers")
        shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        best = [(names[k], shares[k]) for k in np.argsort(-logits, kind="stable")]
        print(f"{path}:", ", ".join(f"{name} {share:.1%}" for name, share in best[:3]))
except Exception as error:  # decoders raise nearly everything on damaged bytes
    reason = " ".join((str(error) or repr(error)).split())
    print(f"{given} cannot be used: {reason}; expected {expected}", file=sys.stderr)
    sys.exit(2)
