"""Damaged, foreign and unusual files for tests, made from the samples beside this module.

Four tables, each by name:

    FINE     (bytes, media type): read by ordinary readers, so they must be accepted
    DAMAGED  empty, or a known kind whose damage the structural check sees: 422 invalid_file
    DEEP     damage that lies deeper than the check has to look; Gemini would refuse these, and a
             check that sees it may say so before: 422 invalid_file either way
    FOREIGN  a kind of file that Gemini does not read: 415 unsupported_media_type

The functions return bytes and take nothing from the clock or from chance.  Standard library only.
"""

import base64
import io
import struct
import zipfile
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent

PDF, PNG, JPEG, WEBP, HEIC, HEIF = (
    "application/pdf", "image/png", "image/jpeg", "image/webp", "image/heic", "image/heif",
)

SAMPLES: dict[str, str] = {
    "invoice-de.pdf": PDF,
    "invoice-two-pages.pdf": PDF,
    "invoice-ja.pdf": PDF,
    "receipt.png": PNG,
    "invoice.jpeg": JPEG,
    "invoice.webp": WEBP,
    "invoice.heic": HEIC,
}


def sample(name: str) -> bytes:
    """A good sample by its file name."""
    return (HERE / name).read_bytes()


# ------------------------------------------------------------------- good files of the least size


def pdf_minimal() -> bytes:
    """A valid PDF of one empty page."""
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 200 200] /Resources << >> >>",
    ]
    out, offsets = b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    xref = len(out)
    out += b"xref\n0 4\n0000000000 65535 f \n"
    out += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    out += b"trailer\n<< /Size 4 /Root 1 0 R >>\n"
    return out + b"startxref\n%d\n%%%%EOF\n" % xref


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """One PNG chunk with its length and CRC."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_minimal() -> bytes:
    """A valid PNG of one white pixel."""
    head = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head)
            + png_chunk(b"IDAT", zlib.compress(b"\x00\xff", 9)) + png_chunk(b"IEND", b""))


def jpeg_minimal() -> bytes:
    """A valid JPEG of one grey pixel."""
    return base64.b64decode(
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERX"
        "RTc4UG1RV19iZ2hnPk1xeXBkeFxlZ2P/wAALCAABAAEBAREA/8QAFAABAAAAAAAAAAAAAAAAAAAAB//EABQQAQAA"
        "AAAAAAAAAAAAAAAAAAD/2gAIAQEAAD8AQH//2Q==")


def webp_minimal() -> bytes:
    """A valid lossless WEBP of one white pixel."""
    return base64.b64decode("UklGRh4AAABXRUJQVlA4TBEAAAAvAAAAAAfQ//73v/+BiOh/AAA=")


def heic_minimal() -> bytes:
    """A valid HEIC of 64 x 64 white pixels."""
    return base64.b64decode(
        "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAUJtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAA"
        "AAAAAAAAAAAAAA5waXRtAAAAAAABAAAAImlsb2MAAAAAREAAAQABAAAAAAFmAAEAAAAAAAAAEwAAACNpaW5mAAAA"
        "AAABAAAAFWluZmUCAAAAAAEAAGh2YzEAAAAAwmlwcnAAAACkaXBjbwAAAHhodmNDAQNwAAAAAAAAAAAAHvAA/P34"
        "+AAADwMgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQCEAAQArQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbqSSmu"
        "bgQEDAgAAAMACAAAAwAIQCIAAQAHRAHBcrAiQAAAABRpc3BlAAAAAAAAAEAAAABAAAAAEHBpeGkAAAAAAwgICAAA"
        "ABZpcG1hAAAAAAAAAAEAAQOBAoMAAAAbbWRhdAAAAA8oAa8EGPwd1z6b1Ze3HGA=")


# ------------------------------------------------------------------------- unusual, but still fine


def padded_pdf(size: int, pdf: bytes | None = None) -> bytes:
    """A valid PDF of exactly `size` bytes: comments before the cross-reference table."""
    pdf = sample("invoice-de.pdf") if pdf is None else pdf
    tail = pdf.rindex(b"startxref")
    xref = int(pdf[tail:].split()[1])
    after = pdf[tail:].split(b"%%EOF", 1)[1]

    line = b"%" + b" padding" * 9 + b"\n"
    for newline in (b"", b"\n"):  # the second where a longer offset would skip this very size
        padding = size - tail
        for _ in range(3):  # a longer padding may need a digit more in the offset
            end = b"startxref\n%d\n%%%%EOF" % (xref + max(padding, 0)) + after + newline
            padding = size - tail - len(end)
        if padding < 0:
            break
        comments = (line * (padding // len(line) + 1))[: max(padding - 1, 0)] + b"\n"
        out = pdf[:xref] + comments[:padding] + pdf[xref:tail] + end
        if b"startxref\n%d\n" % (xref + padding) in end:
            return out
    raise ValueError(f"cannot pad {len(pdf)} bytes to {size}")


def trailing(data: bytes, count: int) -> bytes:
    """The file with `count` bytes of NUL after its end, as some mail gateways leave it."""
    return data + bytes(count)


def pdf_leading(count: int = 200, pdf: bytes | None = None) -> bytes:
    """A PDF whose header comes after `count` bytes of junk (readers look through 1024)."""
    junk = (b"HTTP/1.0 200 OK\r\nX-Filler: " + b"junk " * (count // 5 + 1))[: count - 2] + b"\r\n"
    return junk + (sample("invoice-de.pdf") if pdf is None else pdf)


def pdf_crlf_eof() -> bytes:
    """A PDF that ends in CR LF and an empty line."""
    return sample("invoice-de.pdf").rstrip() + b"\r\n\r\n"


def heic_mif1_first() -> bytes:
    """The HEIC sample with the general brand mif1 first and heic among the compatible ones."""
    return sample("invoice.heic").replace(b"ftypheic", b"ftypmif1", 1)


def heif_general() -> bytes:
    """The HEIC sample with general brands only: nothing but the boxes says that it is HEVC."""
    data = sample("invoice.heic")
    size = struct.unpack_from(">I", data)[0]
    return data[:size].replace(b"heic", b"mif1") + data[size:]


def heic_last_box_to_end() -> bytes:
    """The HEIC sample whose last box has size 0, which means: up to the end of the file."""
    data = bytearray(sample("invoice.heic"))
    at = 0
    while at + struct.unpack_from(">I", data, at)[0] < len(data):
        at += struct.unpack_from(">I", data, at)[0]
    struct.pack_into(">I", data, at, 0)
    return bytes(data)


# ------------------------------------------------------------------------------------------ damaged


def truncated(data: bytes, keep: float = 0.5) -> bytes:
    """The first part of a file, as after a broken transfer."""
    return data[: int(len(data) * keep)]


def pdf_without_eof() -> bytes:
    """The German invoice without its %%EOF."""
    data = sample("invoice-de.pdf")
    return data[: data.rindex(b"%%EOF")]


def pdf_without_header() -> bytes:
    """The German invoice without its %PDF line."""
    data = sample("invoice-de.pdf")
    return data[data.index(b"\n") + 1 :]


def png_without_iend() -> bytes:
    """The receipt without its last chunk."""
    return sample("receipt.png")[:-12]


def png_without_ihdr() -> bytes:
    """The receipt without its first chunk."""
    data = sample("receipt.png")
    return data[:8] + data[8 + 25 :]


def jpeg_without_eoi() -> bytes:
    """The JPEG without its end marker."""
    return sample("invoice.jpeg")[:-2]


def webp_with_riff_size(size: int) -> bytes:
    """The WEBP with another size in its RIFF header."""
    data = sample("invoice.webp")
    return data[:4] + struct.pack("<I", size) + data[8:]


def heic_with_ftyp_size(size: int) -> bytes:
    """The HEIC with another size in its ftyp box."""
    return struct.pack(">I", size) + sample("invoice.heic")[4:]


def png_bad_crc() -> bytes:
    """The receipt with one bit turned in its picture data."""
    data = bytearray(sample("receipt.png"))
    data[data.index(b"IDAT") + 400] ^= 0x10
    return bytes(data)


def pdf_zeroed() -> bytes:
    """The German invoice with its whole middle, cross-reference table included, set to zero."""
    data = sample("invoice-de.pdf")
    return data[:64] + bytes(len(data) - 64 - 6) + b"\n%%EOF"


def jpeg_thumbnail_eoi() -> bytes:
    """A JPEG cut in half whose APP1 segment holds a complete thumbnail, end marker and all."""
    data, thumb = sample("invoice.jpeg"), jpeg_minimal()
    body = b"Exif\0\0" + b"MM\0*\0\0\0\x08\0\0\0\0\0\0" + thumb
    segment = b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
    return data[:2] + segment + truncated(data)[2:]


# ------------------------------------------------------------------------------------------ foreign


def gif_minimal() -> bytes:
    """A valid GIF of one pixel."""
    return base64.b64decode("R0lGODlhAQABAPAAAP///wAAACH5BAAAAAAALAAAAAABAAEAAAICRAEAOw==")


def tiff_minimal(order: str) -> bytes:
    """A valid TIFF of one white pixel, byte order "II" or "MM"."""
    e = "<" if order == "II" else ">"
    tags = [(256, 1), (257, 1), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1),
            (279, 1)]
    out = order.encode() + struct.pack(e + "HI", 42, 10) + b"\xff\0"
    out += struct.pack(e + "H", len(tags))
    for tag, value in tags:
        out += struct.pack(e + "HHI", tag, 4, 1) + struct.pack(e + "I", value)
    return out + struct.pack(e + "I", 0)


def bmp_minimal() -> bytes:
    """A valid BMP of one white pixel."""
    info = struct.pack("<IiiHHIIiiII", 40, 1, 1, 1, 24, 0, 4, 2835, 2835, 0, 0)
    return b"BM" + struct.pack("<IHHI", 58, 0, 0, 54) + info + b"\xff\xff\xff\0"


def ftyp(major: bytes, *compatible: bytes) -> bytes:
    """An ISO base media file of an ftyp box and an empty mdat."""
    body = major + bytes(4) + b"".join(compatible)
    return struct.pack(">I", len(body) + 8) + b"ftyp" + body + struct.pack(">I", 8) + b"mdat"


def zip_of(files: dict[str, str]) -> bytes:
    """A ZIP archive with a fixed date."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name, (2025, 1, 1, 0, 0, 0)), text)
    return out.getvalue()


XML = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
OPC = "http://schemas.openxmlformats.org/package/2006/"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"


def opc(main: str, kind: str, parts: dict[str, str]) -> bytes:
    """An Office package whose main part is at `main`."""
    return zip_of({
        "[Content_Types].xml": XML + f'<Types xmlns="{OPC}content-types">'
        f'<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.'
        f'relationships+xml"/><Default Extension="xml" ContentType="application/xml"/>'
        f'<Override PartName="/{main}" ContentType="application/vnd.openxmlformats-'
        f'officedocument.{kind}.main+xml"/></Types>',
        "_rels/.rels": XML + f'<Relationships xmlns="{OPC}relationships"><Relationship Id="r1" '
        f'Type="{OFFICE}/officeDocument" Target="{main}"/></Relationships>',
        **parts,
    })


def docx_minimal() -> bytes:
    """A Word document of one paragraph."""
    space = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    text = (f'{XML}<w:document xmlns:w="{space}"><w:body><w:p><w:r><w:t>Invoice 1</w:t></w:r>'
            "</w:p></w:body></w:document>")
    return opc("word/document.xml", "wordprocessingml.document", {"word/document.xml": text})


def xlsx_minimal() -> bytes:
    """An Excel workbook of one empty sheet."""
    space = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    return opc("xl/workbook.xml", "spreadsheetml.sheet", {
        "xl/workbook.xml": f'{XML}<workbook xmlns="{space}" xmlns:r="{OFFICE}"><sheets>'
        '<sheet name="Invoice" sheetId="1" r:id="r1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'{XML}<Relationships xmlns="{OPC}relationships">'
        f'<Relationship Id="r1" Type="{OFFICE}/worksheet" Target="sheet1.xml"/></Relationships>',
        "xl/sheet1.xml": f'{XML}<worksheet xmlns="{space}"><sheetData/></worksheet>',
    })


def ole_minimal() -> bytes:
    """An OLE compound file (.doc, .xls, .msg): header, one table sector, one directory sector."""
    free, end, fat = 0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFD
    head = bytes.fromhex("d0cf11e0a1b11ae1") + bytes(16)
    head += struct.pack("<HHHHH6x", 0x3E, 3, 0xFFFE, 9, 6)
    head += struct.pack("<IIIIIIIII", 0, 1, 1, 0, 4096, end, 0, end, 0)
    head += struct.pack("<I", 0) + struct.pack("<I", free) * 108
    table = struct.pack("<II", fat, end) + struct.pack("<I", free) * 126
    name = "Root Entry\0".encode("utf-16-le")
    root = name.ljust(64, b"\0") + struct.pack("<HBBIII", len(name), 5, 1, free, free, free)
    root += bytes(36) + struct.pack("<IQ", end, 0)
    empty = bytes(68) + struct.pack("<III", free, free, free) + bytes(48)
    return head + table + root + empty * 3


# --------------------------------------------------------------------------------------- the tables


FINE: dict[str, tuple[bytes, str]] = {
    **{name: (sample(name), mime) for name, mime in SAMPLES.items()},
    "pdf-minimal": (pdf_minimal(), PDF),
    "pdf-trailing-700": (trailing(sample("invoice-de.pdf"), 700), PDF),
    "pdf-trailing-5000": (trailing(sample("invoice-de.pdf"), 5000), PDF),
    "pdf-leading-200": (pdf_leading(200), PDF),
    "pdf-crlf-eof": (pdf_crlf_eof(), PDF),
    "pdf-padded-200k": (padded_pdf(200_000), PDF),
    "png-minimal": (png_minimal(), PNG),
    "png-trailing": (trailing(sample("receipt.png"), 700), PNG),
    "jpeg-minimal": (jpeg_minimal(), JPEG),
    "jpeg-trailing": (trailing(sample("invoice.jpeg"), 700), JPEG),
    "webp-minimal": (webp_minimal(), WEBP),
    "webp-trailing": (trailing(sample("invoice.webp"), 700), WEBP),
    "heic-minimal": (heic_minimal(), HEIC),
    "heic-trailing": (trailing(sample("invoice.heic"), 700), HEIC),
    "heic-last-box-to-end": (heic_last_box_to_end(), HEIC),
    "heic-mif1-first": (heic_mif1_first(), HEIC),
    "heif-general": (heif_general(), HEIF),
}

DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "pdf-header-only": b"%PDF-1.7\n",
    "pdf-truncated": truncated(sample("invoice-de.pdf")),
    "pdf-two-pages-truncated": truncated(sample("invoice-two-pages.pdf"), 0.9),
    "pdf-without-eof": pdf_without_eof(),
    "png-signature-only": b"\x89PNG\r\n\x1a\n",
    "png-truncated": truncated(sample("receipt.png")),
    "png-without-iend": png_without_iend(),
    "png-without-ihdr": png_without_ihdr(),
    "jpeg-soi-only": b"\xff\xd8\xff",
    "jpeg-truncated": truncated(sample("invoice.jpeg")),
    "jpeg-without-eoi": jpeg_without_eoi(),
    "webp-header-only": b"RIFF\x04\0\0\0WEBP",
    "webp-truncated": truncated(sample("invoice.webp")),
    "webp-riff-size-too-large": webp_with_riff_size(10_000_000),
    "webp-riff-size-zero": webp_with_riff_size(0),
    "heic-truncated-in-ftyp": sample("invoice.heic")[:14],
    "heic-ftyp-size-too-large": heic_with_ftyp_size(0x7FFFFFFF),
    "heic-ftyp-size-too-small": heic_with_ftyp_size(4),
}

DEEP: dict[str, bytes] = {
    "heic-truncated": truncated(sample("invoice.heic")),
    "jpeg-truncated-thumbnail-eoi": jpeg_thumbnail_eoi(),
    "pdf-zeroed": pdf_zeroed(),
    "png-bad-crc": png_bad_crc(),
}

FOREIGN: dict[str, bytes] = {
    "gif": gif_minimal(),
    "tiff-ii": tiff_minimal("II"),
    "tiff-mm": tiff_minimal("MM"),
    "bmp": bmp_minimal(),
    "avif": ftyp(b"avif", b"avif", b"mif1", b"miaf"),
    "avif-mif1": ftyp(b"mif1", b"mif1", b"avif", b"miaf"),
    "mp4": ftyp(b"isom", b"isom", b"mp41"),
    "ftyp-unknown-brand": ftyp(b"zzzz", b"zzzz"),
    "riff-wave": b"RIFF" + struct.pack("<I", 36) + b"WAVEfmt " + struct.pack(
        "<IHHIIHH", 16, 1, 1, 8000, 8000, 1, 8) + b"data" + bytes(4),
    "docx": docx_minimal(),
    "xlsx": xlsx_minimal(),
    "zip": zip_of({"invoice.txt": "Invoice 1\n"}),
    "ole-doc": ole_minimal(),
    "text": "Rechnung Nr. 1, Betrag 10,00 €\n".encode(),
    "text-about-pdf": b"Please find the invoice attached as PDF.\n",
    "html": b"<!DOCTYPE html>\n<html><head><title>Invoice</title></head><body></body></html>\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>\n',
    "json": b'{"invoice": 1}\n',
    "pdf-without-header": pdf_without_header(),
    "nul-bytes": bytes(1000),
}
