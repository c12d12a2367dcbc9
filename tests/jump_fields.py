"""A small CPJUMP1 on a faulty S3 server: 36 fields of 4 channels on 4 plates, and their pixels."""
import io

import numpy as np
import tifffile
from fault_proxy import FaultyS3

BATCH = "2020_11_04_CPJUMP1"
BUCKET = "cellpainting-gallery"
ABOVE = "cpg0000-jump-pilot/source_4/images/"
ADDRESS = f"s3://{BUCKET}/{ABOVE}{BATCH}/"
NUMBERS = (1, 4, 5, 8)
CHANNELS = ("Mito", "ER", "DNA", "Brightfield")
PLATES, FIELDS = (1, 2, 3, 4), range(9)
SIDE = 24                                                     # px


def key(plate: int, field: int, channel: int) -> str:
    """As in CPJUMP1; sk, fk and fl vary."""
    site = f"r{1 + field // 9:02}c{plate % 24 + 1:02}f{1 + field % 9:02}"
    return (f"{BATCH}/images/BR{plate:08}__2020-11-05T19_51_35-Measurement1/Images/"
            f"{site}p01-ch{channel}sk{1 + field}fk1fl{1 + channel}.tiff")


def name(plate: int, field: int) -> str:
    return (f"{BATCH}/BR{plate:08}/2020-11-05T19_51_35-Measurement1/"
            f"r{1 + field // 9:02}c{plate % 24 + 1:02}f{1 + field % 9:02}")


TRUTH = {name(p, f): (p, f) for p in PLATES for f in FIELDS}


def picture(plate: int, field: int, channel: int, side: int = SIDE) -> np.ndarray:
    rng = np.random.default_rng((plate, field, channel))
    return rng.integers(0, 1 << 16, (side, side)).astype(np.uint16)


def tiff(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, photometric="minisblack", **options)
    return file.getvalue()


def put(server: FaultyS3, name: str, body: bytes) -> None:
    server.client.put_object(Bucket=BUCKET, Key=name, Body=body, ACL="public-read")


def files():
    """Key and body of each file."""
    for p in PLATES:
        for f in FIELDS:
            for c in NUMBERS:
                yield key(p, f, c), tiff(picture(p, f, c))


def fill(server: FaultyS3) -> None:
    for name, body in files():
        put(server, ABOVE + name, body)
    put(server, f"{ABOVE}{BATCH}/illum/BR1_IllumDNA.npy", b"x")
