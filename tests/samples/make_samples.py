#!/usr/bin/python3
"""Draw the sample invoices of this directory again, and write expected.json.

Debian 12, nothing else:

    apt-get install --no-install-recommends python3-reportlab poppler-utils imagemagick \\
        libjpeg-turbo-progs libimage-exiftool-perl webp libheif-examples \\
        fonts-lato fonts-ipaexfont-gothic fonts-noto-mono

    /usr/bin/python3 make_samples.py [directory]

An invoice is written down once, as data.  The drawing and expected.json both come from that data,
so they cannot differ, and every sum is computed here with Decimal and never typed in.  All
documents are drawn as PDF; the pictures are that PDF rendered by pdftoppm and then treated like a
scan or a photograph.

Every company, person and address is invented.  Bank accounts are the examples of the IBAN
registry, tax numbers those of the authorities' own forms; mail domains end in .example.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any, Callable

from reportlab import rl_config
from reportlab.graphics import renderPDF, shapes
from reportlab.graphics.barcode import code128, qr
from reportlab.lib.colors import Color, HexColor, black, white
from reportlab.lib.pagesizes import A4
from reportlab.lib.units import mm
from reportlab.lib.utils import simpleSplit
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.ttfonts import TTFont
from reportlab.pdfgen.canvas import Canvas

rl_config.invariant = 1  # no clock, no random document id: the same bytes each time

FONTS = {
    "Lato": "/usr/share/fonts/truetype/lato/Lato-Regular.ttf",
    "Lato-Bold": "/usr/share/fonts/truetype/lato/Lato-Bold.ttf",
    "Lato-Light": "/usr/share/fonts/truetype/lato/Lato-Light.ttf",
    "IPAex": "/usr/share/fonts/opentype/ipaexfont-gothic/ipaexg.ttf",
    "Mono": "/usr/share/fonts/truetype/noto/NotoSansMono-Regular.ttf",
    "Mono-Bold": "/usr/share/fonts/truetype/noto/NotoSansMono-Bold.ttf",
}

WIDTH, HEIGHT = A4
LEFT, RIGHT = 54.0, WIDTH - 54.0
INK, GREY, HAIR = HexColor("#22262b"), HexColor("#6b7280"), HexColor("#d5d9df")


# ---------------------------------------------------------------------------------- the data


@dataclass
class Line:
    """One line of an invoice; amounts are net and in the document's currency."""

    description: str
    code: str | None
    quantity: str
    unit: str | None
    price: str
    rate: str

    @property
    def amount(self) -> Decimal:
        """Quantity times price, not yet rounded."""
        return Decimal(self.quantity) * Decimal(self.price)


@dataclass
class Invoice:
    """What a reader should find; `fields` holds what is printed as it stands."""

    fields: dict[str, Any]
    vendor: dict[str, str]
    customer: dict[str, str]
    lines: list[Line]
    step: str = "0.01"  # smallest unit of the currency
    discount: str = "0"  # per cent of the subtotal
    paid: str | None = None
    paid_in_full: bool = False
    prints_due: bool = False  # an "amount due" is printed on its own
    line_rates: bool = True  # each line says its tax rate
    round_down: bool = False  # tax is cut, not rounded (usual in Japan)
    taxes: list[dict[str, Decimal]] = field(init=False)
    totals: dict[str, Any] = field(init=False)  # Decimal, or None where not printed

    def __post_init__(self) -> None:
        by_rate: dict[str, Decimal] = {}
        for line in self.lines:
            by_rate[line.rate] = by_rate.get(line.rate, Decimal(0)) + self.net(line)
        subtotal = sum(by_rate.values(), Decimal(0))
        off = Decimal(0)
        self.taxes = []
        for rate in sorted(by_rate, key=Decimal, reverse=True):
            share = self.money(by_rate[rate] * Decimal(self.discount) / 100)
            base = by_rate[rate] - share
            off += share
            tax = base * Decimal(rate) / 100
            tax = Decimal(int(tax)) if self.round_down else self.money(tax)
            self.taxes.append({"rate": Decimal(rate), "base": base, "amount": tax})
        tax = sum((t["amount"] for t in self.taxes), Decimal(0))
        total = subtotal - off + tax
        paid = Decimal(self.paid) if self.paid else total if self.paid_in_full else None
        self.totals = {
            "subtotal": subtotal,
            "discount": off if off else None,
            "tax": tax,
            "total": total,
            "amount_paid": paid,
            "amount_due": total - (paid or 0) if self.prints_due else None,
        }

    def money(self, value: Decimal) -> Decimal:
        """Round to the currency's smallest unit, half up."""
        return value.quantize(Decimal(self.step), ROUND_HALF_UP)

    def net(self, line: Line) -> Decimal:
        """The amount printed on a line."""
        return self.money(line.amount)

    def expected(self) -> dict[str, Any]:
        """The invoice in the shape of the answer; what is not printed is null."""
        names = "document_type invoice_number issue_date due_date currency purchase_order"
        out: dict[str, Any] = {n: self.fields.get(n) for n in (names + " payment_terms").split()}
        parts = "name tax_id registration_id address email iban bic"
        out["vendor"] = {n: self.vendor.get(n) for n in parts.split()}
        out["customer"] = {n: self.customer.get(n) for n in ("name", "tax_id", "address")}
        out["line_items"] = [
            {
                "description": n.description,
                "product_code": n.code,
                "quantity": n.quantity,
                "unit": n.unit,
                "unit_price": n.price,
                "tax_rate": n.rate if self.line_rates else None,
                "tax_amount": None,
                "amount": str(self.net(n)),
            }
            for n in self.lines
        ]
        out["taxes"] = [{k: str(v) for k, v in t.items()} for t in self.taxes]
        out["totals"] = {k: None if v is None else str(v) for k, v in self.totals.items()}
        return out


GERMAN = Invoice(
    fields={
        "document_type": "invoice",
        "invoice_number": "RE-2025-0412",
        "issue_date": "2025-11-19",
        "due_date": "2025-12-19",
        "currency": "EUR",
        "purchase_order": "BST-88107",
        "payment_terms": "Zahlbar innerhalb von 30 Tagen ohne Abzug.",
    },
    vendor={
        "name": "Grünfeld & Söhne Büroausstattung GmbH",
        "tax_id": "DE123456789",
        "registration_id": "HRB 98765",
        "address": "Lindenstraße 14, 50674 Köln",
        "email": "rechnung@gruenfeld.example",
        "iban": "DE89370400440532013000",
        "bic": "COBADEFFXXX",
    },
    customer={
        "name": "Buchhandlung Weißmüller e. K.",
        "address": "Große Bäckerstraße 7, 20095 Hamburg",
    },
    lines=[
        Line("Höhenverstellbarer Schreibtisch, Eiche geölt, 160 × 80 cm",
             "ST-1680-EI", "2", "Stk.", "649.00", "19"),
        Line("Bürodrehstuhl „Möwe“, Bezug anthrazit", "DS-220-AN", "4", "Stk.", "289.50", "19"),
        Line("LED-Schreibtischleuchte, dimmbar", "LE-045", "4", "Stk.", "74.90", "19"),
        Line("Kabelkanal, weiß, Länge 1,5 m", "KK-150-W", "6", "Stk.", "12.35", "19"),
        Line("Aktenordner A4, Rückenbreite 80 mm, grün", "AO-80-GR", "25", "Stk.", "3.29", "19"),
        Line("Lieferung und Aufbau vor Ort", "DL-AUFBAU", "3.5", "Std.", "58.00", "19"),
    ],
)

BRITISH = Invoice(
    fields={
        "document_type": "invoice",
        "invoice_number": "HF-104877",
        "issue_date": "2025-10-03",
        "due_date": "2025-11-02",
        "currency": "GBP",
        "purchase_order": "PO-2025-3391",
        "payment_terms": "30 days net",
    },
    vendor={
        "name": "Harrow & Finch Trade Supplies Ltd",
        "tax_id": "GB999999973",
        "registration_id": "01234567",
        "address": "Unit 6, Old Tannery Yard, Leeds LS9 8AG, United Kingdom",
        "email": "accounts@harrowfinch.example",
        "iban": "GB29NWBK60161331926819",
        "bic": "NWBKGB2L",
    },
    customer={
        "name": "Whitcombe Joinery Ltd",
        "tax_id": "GB888888855",
        "address": "23 Mill Lane, York YO1 9TT, United Kingdom",
    },
    discount="5",
    paid="500.00",
    prints_due=True,
    lines=[
        Line("Birch plywood BB/BB, 18 mm, 2440 × 1220", "PLY-BB18", "12", "sheet", "58.40", "20"),
        Line("Birch plywood BB/BB, 12 mm, 2440 × 1220", "PLY-BB12", "8", "sheet", "44.15", "20"),
        Line("Birch plywood BB/BB, 6 mm, 2440 × 1220", "PLY-BB06", "10", "sheet", "27.90", "20"),
        Line("MDF moisture resistant, 18 mm", "MDF-MR18", "14", "sheet", "31.25", "20"),
        Line("MDF standard, 12 mm", "MDF-ST12", "6", "sheet", "19.80", "20"),
        Line("European oak PAR, 27 × 145 mm", "OAK-27145", "36.5", "m", "14.60", "20"),
        Line("European oak PAR, 20 × 95 mm", "OAK-20095", "42", "m", "8.95", "20"),
        Line("Redwood PSE, 21 × 70 mm", "RED-21070", "60", "m", "2.45", "20"),
        Line("Ash veneered edging, 22 mm, 50 m roll", "EDG-ASH22", "4", "roll", "11.99", "20"),
        Line("Concealed hinge 110°, soft close", "HNG-110SC", "120", "each", "1.85", "20"),
        Line("Mounting plate, 2 mm, euro screw", "HNG-PL2", "120", "each", "0.42", "20"),
        Line("Butt hinge, solid brass, 76 mm, pair", "HNG-BB76", "18", "pair", "9.75", "20"),
        Line("Drawer runner, full extension, 450 mm", "RUN-FX450", "24", "pair", "16.20", "20"),
        Line("Drawer runner, full extension, 500 mm", "RUN-FX500", "16", "pair", "17.35", "20"),
        Line("Bar handle, brushed nickel, 160 mm", "HDL-BN160", "48", "each", "3.65", "20"),
        Line("Knob, turned beech, 40 mm", "KNB-BE40", "30", "each", "1.95", "20"),
        Line("Mortice latch, 64 mm, satin", "LCH-M64", "10", "each", "5.85", "20"),
        Line("Lever handle on rose, satin steel, pair", "HDL-LR", "10", "pair", "21.40", "20"),
        Line("Wood screw 4.0 × 40, box of 200", "SCR-4040", "15", "box", "6.10", "20"),
        Line("Wood screw 5.0 × 70, box of 200", "SCR-5070", "10", "box", "9.45", "20"),
        Line("Confirmat screw 7 × 50, box of 100", "SCR-CF750", "8", "box", "7.20", "20"),
        Line("Beech dowel 8 × 35, bag of 500", "DWL-0835", "5", "bag", "8.90", "20"),
        Line("Biscuit no. 20, box of 1000", "BSC-20", "2", "box", "24.50", "20"),
        Line("Shelf support, 5 mm, nickel, bag of 100", "SHF-5N", "6", "bag", "4.75", "20"),
        Line("PVA wood glue D3, 5 litre", "GLU-D3-5", "4", "tub", "18.95", "20"),
        Line("Contact adhesive, 1 litre", "GLU-CA1", "6", "tin", "13.30", "20"),
        Line("Hard wax oil, matt, 2.5 litre", "OIL-HWM25", "5", "tin", "69.00", "20"),
        Line("Danish oil, 1 litre", "OIL-DAN1", "4", "tin", "15.85", "20"),
        Line("Abrasive disc 150 mm, P120, box of 50", "ABR-150120", "4", "box", "19.60", "20"),
        Line("Abrasive disc 150 mm, P240, box of 50", "ABR-150240", "4", "box", "19.60", "20"),
        Line("Saw blade 250 × 30, 60 teeth", "BLD-25060", "2", "each", "46.75", "20"),
        Line("Router cutter, straight, 12.7 mm", "CUT-S127", "3", "each", "22.15", "20"),
        Line("Brad point drill set, 3 to 10 mm", "DRL-BP8", "2", "set", "28.40", "20"),
        Line("Dust mask FFP3, box of 10", "PPE-FFP3", "3", "box", "17.25", "20"),
        Line("Work gloves, size 9, pair", "PPE-GL9", "12", "pair", "2.15", "20"),
        Line("Book: Stair Building in Practice", "BK-STAIR", "1", "each", "34.99", "0"),
        Line("Book: Sash Windows, Repair and Renewal", "BK-SASH", "2", "each", "26.50", "0"),
        Line("Timber delivery, 7.5 t vehicle with crane", "DEL-75C", "1", "job", "85.00", "20"),
    ],
)

JAPANESE = Invoice(
    fields={
        "document_type": "invoice",
        "invoice_number": "INV-20251031-027",
        "issue_date": "2025-10-31",
        "due_date": "2025-11-30",
        "currency": "JPY",
        "payment_terms": "お支払期限までに下記口座へお振込みください。",
    },
    vendor={
        "name": "株式会社あおば文具",
        "tax_id": "T1234567890123",
        "address": "〒980-0811 宮城県仙台市青葉区一番町9丁目9-9 あおばビル3階",
        "email": "seikyu@aoba-bungu.example",
    },
    customer={
        "name": "有限会社みなと商店",
        "address": "〒231-0023 神奈川県横浜市中区山下町999番地",
    },
    step="1",
    round_down=True,
    prints_due=True,
    lines=[
        Line("コピー用紙 A4 500枚×10冊", "KP-A4-10", "6", "箱", "3980", "10"),
        Line("油性ボールペン 黒 0.7mm(10本入)", "BP-07-BK", "12", "箱", "880", "10"),
        Line("クリアファイル A4 透明(100枚入)", "CF-A4-100", "3", "袋", "1450", "10"),
        Line("ホワイトボード用マーカー 4色セット", "WM-4C", "8", "組", "620", "10"),
        Line("緑茶ペットボトル 500ml×24本", "TD-500-24", "5", "箱", "2160", "8"),
        Line("個包装クッキー詰め合わせ 48枚", "CK-48", "2", "箱", "3240", "8"),
        Line("オフィスチェア修理作業", "SV-CHAIR", "2", "時間", "4500", "10"),
    ],
)

RECEIPT = Invoice(
    fields={
        "document_type": "receipt",
        "invoice_number": "004-7731-20250918",
        "issue_date": "2025-09-18",
        "currency": "USD",
    },
    vendor={
        "name": "Juniper Street Hardware",
        "address": "1180 Juniper Street, Portland, ME 04101",
    },
    customer={},
    paid_in_full=True,
    line_rates=False,
    lines=[
        Line("CLAW HAMMER 16OZ", "100482", "1", None, "18.99", "5.5"),
        Line("WOOD SCREW #8 1LB", "220915", "2", None, "7.49", "5.5"),
        Line("SANDPAPER ASST 10PK", "314006", "1", None, "6.25", "5.5"),
        Line("PAINT BRUSH 2IN", "418330", "3", None, "4.79", "5.5"),
        Line("WALL ANCHOR KIT", "229871", "1", None, "9.98", "5.5"),
        Line("LED BULB 60W 4PK", "507114", "1", None, "8.97", "5.5"),
    ],
)

POLISH = Invoice(
    fields={
        "document_type": "invoice",
        "invoice_number": "FV/2025/09/0163",
        "issue_date": "2025-09-24",
        "due_date": "2025-10-08",
        "currency": "PLN",
        "payment_terms": "Przelew, 14 dni",
    },
    vendor={
        "name": "Żółta Łódź Drukarnia Sp. z o.o.",
        "tax_id": "1234563218",
        "registration_id": "0000999999",
        "address": "ul. Źródlana 18, 90-312 Łódź",
        "email": "faktury@zoltalodz.example",
        "iban": "PL61109010140000071219812874",
        "bic": "WBKPPLPP",
    },
    customer={
        "name": "Księgarnia Pod Dębem S.C.",
        "tax_id": "9999999996",
        "address": "ul. Świętojańska 41, 81-391 Gdynia",
    },
    prints_due=True,
    lines=[
        Line("Druk katalogu A5, 48 stron, szycie zeszytowe", "KAT-A5-48", "500", "szt.", "4.85",
             "23"),
        Line("Plakat B2, papier kredowy 170 g", "PL-B2-170", "120", "szt.", "6.40", "23"),
        Line("Zakładki do książek, folia błyszcząca", "ZAK-FB", "2000", "szt.", "0.18", "23"),
        Line("Album fotograficzny, oprawa twarda (ISBN)", "ALB-OT", "40", "egz.", "38.50", "5"),
        Line("Skład i przygotowanie do druku", "DTP", "6.5", "godz.", "95.00", "23"),
    ],
)

FRENCH = Invoice(
    fields={
        "document_type": "invoice",
        "invoice_number": "F2025-0087",
        "issue_date": "2025-09-02",
        "due_date": "2025-10-17",
        "currency": "EUR",
        "purchase_order": "CMD-5520",
        "payment_terms": "45 jours, par virement",
    },
    vendor={
        "name": "Atelier Bérénice Forêt SARL",
        "tax_id": "FR44732829320",
        "registration_id": "732 829 320",
        "address": "8 bis rue de l’Église, 69005 Lyon",
        "email": "compta@atelier-foret.example",
        "iban": "FR1420041010050500013M02606",
        "bic": "PSSTFRPPXXX",
    },
    customer={
        "name": "Hôtel du Vieux Chêne SAS",
        "tax_id": "FR83404833048",
        "address": "2 place de la Liberté, 21000 Dijon",
    },
    discount="10",
    lines=[
        Line("Conception d’identité visuelle", "ID-01", "1", "forfait", "2400.00", "20"),
        Line("Création de la signalétique intérieure", "SIG-INT", "18", "heure", "85.00", "20"),
        Line("Menus imprimés, papier vergé crème", "IMP-MENU", "60", "pièce", "7.15", "20"),
        Line("Livret d’accueil relié, 24 pages", "LIV-24", "80", "pièce", "9.20", "5.5"),
        Line("Déplacement Lyon – Dijon", "DEP", "388", "km", "0.65", "20"),
    ],
)

SWISS = Invoice(
    fields={
        "document_type": "invoice",
        "invoice_number": "2025-1184",
        "issue_date": "2025-08-28",
        "due_date": "2025-09-27",
        "currency": "CHF",
        "payment_terms": "30 Tage netto",
    },
    vendor={
        "name": "Bergluft Velowerkstatt AG",
        "tax_id": "CHE-123.456.788 MWST",
        "address": "Mühlegasse 9, 3011 Bern",
        "email": "buero@bergluft-velo.example",
        "iban": "CH9300762011623852957",
    },
    customer={
        "name": "Kurierdienst Aaretal GmbH",
        "address": "Bahnhofstrasse 32, 3600 Thun",
    },
    lines=[
        Line("Jahresservice Lastenvelo", "SRV-LV", "3", "Stk.", "185.00", "8.1"),
        Line("Bremsbeläge, Paar", "BB-204", "6", "Paar", "24.90", "8.1"),
        Line("Kette 10-fach, E-Bike", "KE-10E", "3", "Stk.", "46.50", "8.1"),
        Line("Arbeitszeit Werkstatt", "ARB", "2.25", "Std.", "110.00", "8.1"),
    ],
)


# ------------------------------------------------------------------------------- small tools


def number(value: Decimal | str, group: str, point: str) -> str:
    """A number with the given thousands separator and decimal point."""
    return f"{Decimal(value):,}".replace(",", "\0").replace(".", point).replace("\0", group)


def iban_print(iban: str) -> str:
    """An IBAN in groups of four, as it is printed."""
    return " ".join(iban[i : i + 4] for i in range(0, len(iban), 4))


def date_print(iso: str, form: str) -> str:
    """An ISO date in a form made of Y, M and D."""
    year, month, day = iso.split("-")
    return form.replace("Y", year).replace("M", month).replace("D", day)


def put(c: Canvas, x: float, y: float, text: str, font: str = "Lato", size: float = 9,
        colour: Color = INK, align: str = "left") -> None:
    """Write one line of text at a baseline."""
    c.setFont(font, size)
    c.setFillColor(colour)
    {"left": c.drawString, "right": c.drawRightString, "centre": c.drawCentredString}[align](
        x, y, text)


def rule(c: Canvas, x1: float, x2: float, y: float, colour: Color = HAIR,
         width: float = 0.5) -> None:
    """Draw a horizontal line."""
    c.setStrokeColor(colour)
    c.setLineWidth(width)
    c.line(x1, y, x2, y)


def draw_qr(c: Canvas, x: float, y: float, size: float, text: str) -> None:
    """Draw a QR code (level M) whose lower left corner is at x, y."""
    code = qr.QrCodeWidget(text, barLevel="M", barBorder=0)
    x1, y1, x2, y2 = code.getBounds()
    drawing = shapes.Drawing(size, size, transform=[size / (x2 - x1), 0, 0, size / (y2 - y1), 0, 0])
    drawing.add(code)
    renderPDF.draw(drawing, c, x, y)


def new_canvas(path: Path, title: str, author: str, font: str,
               size: tuple[float, float] = A4) -> Canvas:
    """A canvas that starts in an embedded font, so that no other is named in the file."""
    c = Canvas(str(path), pagesize=size, initialFontName=font, pageCompression=1, lang="und")
    c.setTitle(title)
    c.setAuthor(author)
    return c


# ----------------------------------------------------------------------- the western letter


@dataclass
class Look:
    """How a letter is printed: language, colours, and what stands around the figures."""

    words: dict[str, str]
    accent: str
    head: str  # "plain", "band" or "side"
    date_form: str
    show: Callable[[Decimal | str], str]  # a number
    cash: Callable[[Decimal], str]  # a number with its currency
    meta: list[tuple[str, str]]  # these five may name a field of the invoice in braces
    footer: list[list[str]]
    pay: list[tuple[str, str]]
    notes: list[str]
    intro: list[str] = field(default_factory=list)
    mark: str = "blocks"
    sender_line: bool = False
    bottom: float = 96.0  # nothing but the footer below
    epc: bool = False
    slip: bool = False
    row: float = 0  # extra height of a row
    tax_line: str = ""  # the customer's tax number, below the address


def filled(text: str, inv: Invoice, look: Look) -> str:
    """A text with the fields it names, dates and IBAN as they are printed."""
    values = {k: date_print(v, look.date_form) if k.endswith("_date") else v
              for k, v in inv.fields.items()}
    vendor = {k: iban_print(v) if k == "iban" else v for k, v in inv.vendor.items()}
    return text.format(**values, **vendor)


def draw_logo(c: Canvas, x: float, y: float, size: float, look: Look, ink: Color) -> None:
    """The vendor's mark, a few simple shapes."""
    c.saveState()
    c.setFillColor(ink)
    c.setStrokeColor(ink)
    if look.mark == "blocks":
        c.roundRect(x, y, size * 0.44, size, 2, stroke=0, fill=1)
        c.setFillAlpha(0.55)
        c.roundRect(x + size * 0.54, y, size * 0.46, size * 0.46, 2, stroke=0, fill=1)
        c.circle(x + size * 0.77, y + size * 0.77, size * 0.23, stroke=0, fill=1)
    elif look.mark == "peaks":
        for left, top, alpha in ((0.0, 0.72, 0.5), (0.28, 1.0, 1.0)):
            c.setFillAlpha(alpha)
            p = c.beginPath()
            p.moveTo(x + size * left, y)
            p.lineTo(x + size * (left + 0.36), y + size * top)
            p.lineTo(x + size * (left + 0.72), y)
            p.close()
            c.drawPath(p, stroke=0, fill=1)
    elif look.mark == "ring":
        c.setLineWidth(size * 0.11)
        c.circle(x + size / 2, y + size / 2, size * 0.43, stroke=1, fill=0)
        p = c.beginPath()
        p.moveTo(x + size * 0.26, y + size * 0.36)
        p.lineTo(x + size * 0.5, y + size * 0.74)
        p.lineTo(x + size * 0.74, y + size * 0.36)
        p.close()
        c.drawPath(p, stroke=0, fill=1)
    else:
        for i, (height, alpha) in enumerate(((0.55, 0.45), (1.0, 1.0), (0.75, 0.7))):
            c.setFillAlpha(alpha)
            c.rect(x + i * size * 0.36, y, size * 0.28, size * height, stroke=0, fill=1)
    c.restoreState()


def draw_head(c: Canvas, inv: Invoice, look: Look) -> None:
    """The top of the first page: mark, name, title."""
    accent = HexColor(look.accent)
    name, title = inv.vendor["name"], look.words["title"]
    if look.head == "band":
        c.setFillColor(accent)
        c.rect(0, HEIGHT - 84, WIDTH, 84, stroke=0, fill=1)
        draw_logo(c, LEFT, HEIGHT - 58, 32, look, white)
        put(c, LEFT + 44, HEIGHT - 44, name, "Lato-Bold", 15, white)
        put(c, LEFT + 44, HEIGHT - 58, look.words["tagline"], "Lato", 8.5, white)
        put(c, RIGHT, HEIGHT - 51, title, "Lato-Light", 26, white, "right")
        return
    if look.head == "side":
        c.setFillColor(accent)
        c.rect(0, 0, 9, HEIGHT, stroke=0, fill=1)
    draw_logo(c, LEFT, HEIGHT - 74, 30, look, accent)
    put(c, LEFT + 42, HEIGHT - 56, name, "Lato-Bold", 14.5)
    put(c, LEFT + 42, HEIGHT - 70, look.words["tagline"], "Lato", 8.5, GREY)
    put(c, RIGHT, HEIGHT - 66, title, "Lato-Light", 24, accent, "right")
    rule(c, LEFT, RIGHT, HEIGHT - 88, accent, 1.1)


def draw_parties(c: Canvas, inv: Invoice, look: Look) -> float:
    """The customer's address, the vendor's where it is printed, and the dates."""
    y = HEIGHT - 124
    if look.sender_line:
        line = inv.vendor["name"] + " · " + inv.vendor["address"].replace(", ", " · ")
        put(c, LEFT, y, line, size=6.8, colour=GREY)
        rule(c, LEFT, LEFT + pdfmetrics.stringWidth(line, "Lato", 6.8), y - 3)
    else:
        put(c, LEFT, y, look.words["bill_to"], "Lato-Bold", 8, HexColor(look.accent))
    y -= 18
    put(c, LEFT, y, inv.customer["name"], "Lato-Bold", 10.5)
    for text in [*inv.customer["address"].split(", "), *([look.tax_line] * bool(look.tax_line))]:
        y -= 13.5
        put(c, LEFT, y, text, size=10)
    low = y
    y = HEIGHT - 124
    for label, value in look.meta:
        put(c, WIDTH - 254, y, label, size=9, colour=GREY)
        put(c, RIGHT, y, filled(value, inv, look), "Lato-Bold", 9, align="right")
        y -= 6
        rule(c, WIDTH - 254, RIGHT, y)
        y -= 10.5
    y = min(low, y) - 34
    for i, text in enumerate(look.intro):
        text = filled(text, inv, look)
        put(c, LEFT, y, text, "Lato-Bold" if i == 0 else "Lato", 13 if i == 0 else 9.5)
        y -= 20 if i == 0 else 14
    return y - (14 if look.intro else 4)


COLUMNS = {  # right edges, apart from the two that begin at the left
    "pos": LEFT + 4, "description": LEFT + 26, "quantity": RIGHT - 196, "unit": RIGHT - 190,
    "price": RIGHT - 94, "rate": RIGHT - 62, "amount": RIGHT - 5,
}


def draw_table_head(c: Canvas, y: float, look: Look) -> float:
    """The names of the columns; returns the baseline of the first row."""
    c.setFillColor(HexColor(look.accent))
    c.rect(LEFT, y - 6, RIGHT - LEFT, 19, stroke=0, fill=1)
    for key, x in COLUMNS.items():
        left = key in ("pos", "description", "unit")
        put(c, x, y, look.words[key], "Lato-Bold", 8, white, "left" if left else "right")
    return y - 20


def row_texts(line: Line) -> list[str]:
    """A description broken to the width of its column."""
    room = COLUMNS["quantity"] - 34 - COLUMNS["description"]
    return simpleSplit(line.description, "Lato", 9, room)


def draw_row(c: Canvas, y: float, index: int, line: Line, inv: Invoice, look: Look) -> float:
    """One line of the table; returns the baseline of the next."""
    texts = row_texts(line)
    compact = look.row == 0
    height = 11.5 * len(texts) + (3.6 if compact else 14 + look.row)
    if index % 2 == 0:
        c.setFillColor(HexColor("#f5f6f8"))
        top = y + (10.2 if compact else 11.5)
        c.rect(LEFT, top - height, RIGHT - LEFT, height, stroke=0, fill=1)
    put(c, COLUMNS["pos"], y, str(index), colour=GREY)
    for i, text in enumerate(texts):
        put(c, COLUMNS["description"], y - 11.5 * i, text)
    code = line.code or ""
    if compact:
        put(c, COLUMNS["quantity"] - 34, y, code, size=7, colour=GREY, align="right")
    else:
        put(c, COLUMNS["description"], y - 11.5 * len(texts), code, size=7.2, colour=GREY)
    put(c, COLUMNS["quantity"], y, look.show(line.quantity), align="right")
    put(c, COLUMNS["unit"], y, line.unit or "")
    put(c, COLUMNS["price"], y, look.show(line.price), align="right")
    put(c, COLUMNS["rate"], y, look.show(line.rate) + look.words["percent"], align="right")
    put(c, COLUMNS["amount"], y, look.show(inv.net(line)), align="right")
    return y - height


def draw_carry(c: Canvas, y: float, label: str, amount: Decimal, look: Look) -> float:
    """The sum carried from one page to the next."""
    put(c, COLUMNS["price"], y, label, "Lato-Bold", 8.5, GREY, "right")
    put(c, COLUMNS["amount"], y, look.show(amount), "Lato-Bold", 9, GREY, "right")
    return y - 18


def draw_totals(c: Canvas, y: float, inv: Invoice, look: Look) -> float:
    """Subtotal, discount, taxes, total; returns the lowest baseline."""
    accent, words, totals = HexColor(look.accent), look.words, inv.totals
    x = RIGHT - 214
    rows = [(words["subtotal"], totals["subtotal"])]
    if totals["discount"]:
        rows.append((words["discount"].format(inv.discount), -totals["discount"]))
    for tax in inv.taxes:
        label = words["tax"].format(rate=look.show(tax["rate"]), base=look.show(tax["base"]))
        rows.append((label, tax["amount"]))
    for label, value in rows:
        put(c, x, y, label)
        put(c, COLUMNS["amount"], y, look.show(value).replace("-", "−"), align="right")
        y -= 15.5
    y -= 9
    c.setFillColor(accent)
    c.rect(x - 8, y - 8, RIGHT - x + 8, 24, stroke=0, fill=1)
    put(c, x, y, words["total"], "Lato-Bold", 11, white)
    put(c, COLUMNS["amount"], y, look.cash(totals["total"]), "Lato-Bold", 11.5, white, "right")
    y -= 24
    if totals["amount_paid"] is not None:
        put(c, x, y, words["paid"])
        put(c, COLUMNS["amount"], y, "−" + look.show(totals["amount_paid"]), align="right")
        y -= 17
    if totals["amount_due"] is not None:
        put(c, x, y, words["due"], "Lato-Bold", 10)
        put(c, COLUMNS["amount"], y, look.cash(totals["amount_due"]), "Lato-Bold", 10,
            align="right")
        y -= 17
    return y


def draw_payment(c: Canvas, y: float, inv: Invoice, look: Look) -> float:
    """How to pay, to the left of the totals."""
    x = LEFT
    if look.epc:
        lines = ["BCD", "002", "1", "SCT", inv.vendor["bic"], inv.vendor["name"],
                 inv.vendor["iban"], f"EUR{inv.totals['total']}", "", "",
                 inv.fields["invoice_number"]]
        draw_qr(c, x, y - 62, 70, "\n".join(lines))
        x += 84
    put(c, x, y, look.words["pay"], "Lato-Bold", 9, HexColor(look.accent))
    for label, value in look.pay:
        y -= 14
        put(c, x, y, label, size=8.5, colour=GREY)
        put(c, x + look_width(look), y, filled(value, inv, look), size=8.5)
    return y - (40 if look.epc else 14)


def look_width(look: Look) -> float:
    """Room for the labels of the payment block."""
    return 12.0 + max(pdfmetrics.stringWidth(label, "Lato", 8.5) for label, _ in look.pay)


def draw_footer(c: Canvas, inv: Invoice, page: int, pages: int, look: Look) -> None:
    """Small print at the foot of every page."""
    y = 74.0
    rule(c, LEFT, RIGHT, y + 12)
    step = (RIGHT - LEFT) / len(look.footer)
    for i, column in enumerate(look.footer):
        for j, text in enumerate(column):
            put(c, LEFT + i * step, y - 10 * j, filled(text, inv, look), size=7.2, colour=GREY)
    if pages > 1:
        put(c, RIGHT, 24, look.words["page"].format(page, pages), size=7.5, colour=GREY,
            align="right")


def draw_slip(c: Canvas, inv: Invoice) -> None:
    """The Swiss payment part with its QR code, at the foot of the page."""
    top, cut, v = 105 * mm, 62 * mm, inv.vendor
    total = number(inv.totals["total"], " ", ".")
    c.setDash(3, 2)
    rule(c, 0, WIDTH, top, GREY)
    c.line(cut, 0, cut, top)
    c.setDash()

    def block(x: float, y: float, small: float, size: float, parts: list[tuple[str, list[str]]]
              ) -> None:
        for label, texts in parts:
            put(c, x, y, label, "Lato-Bold", small, black)
            for text in texts:
                y -= size + 2
                put(c, x, y, text, size=size, colour=black)
            y -= size + 7

    def home(party: dict[str, str]) -> list[str]:
        return [party["name"], *party["address"].split(", ")]

    account = ("Konto / Zahlbar an", [iban_print(v["iban"]), *home(v)])
    payer = ("Zahlbar durch", home(inv.customer))
    put(c, 5 * mm, top - 9 * mm, "Empfangsschein", "Lato-Bold", 11, black)
    block(5 * mm, top - 16 * mm, 6, 8, [account, payer])
    block(5 * mm, 34 * mm, 6, 8, [("Währung", ["CHF"])])
    block(18 * mm, 34 * mm, 6, 8, [("Betrag", [total])])
    put(c, cut - 5 * mm, 20 * mm, "Annahmestelle", "Lato-Bold", 6, black, "right")
    x, right = cut + 5 * mm, cut + 56 * mm
    put(c, x, top - 9 * mm, "Zahlteil", "Lato-Bold", 11, black)
    street, town = v["address"].split(", ")
    to_street, to_town = inv.customer["address"].split(", ")
    payload = ["SPC", "0200", "1", v["iban"], "S", v["name"], *street.rsplit(" ", 1),
               *town.split(" ", 1), "CH", *[""] * 7, str(inv.totals["total"]), "CHF", "S",
               inv.customer["name"], *to_street.rsplit(" ", 1), *to_town.split(" ", 1), "CH",
               "NON", "", "Rechnung " + inv.fields["invoice_number"], "EPD"]
    side = 46 * mm
    draw_qr(c, x, top - 17 * mm - side, side, "\n".join(payload))
    mid_x, mid_y, u = x + side / 2, top - 17 * mm - side / 2, 7 * mm
    c.setFillColor(white)
    c.rect(mid_x - u / 2 - 1, mid_y - u / 2 - 1, u + 2, u + 2, stroke=0, fill=1)
    c.setFillColor(black)
    c.rect(mid_x - u / 2, mid_y - u / 2, u, u, stroke=0, fill=1)
    c.setFillColor(white)
    c.rect(mid_x - u * 0.3, mid_y - u * 0.09, u * 0.6, u * 0.18, stroke=0, fill=1)
    c.rect(mid_x - u * 0.09, mid_y - u * 0.3, u * 0.18, u * 0.6, stroke=0, fill=1)
    block(x, 34 * mm, 8, 10, [("Währung", ["CHF"])])
    block(x + 18 * mm, 34 * mm, 8, 10, [("Betrag", [total])])
    note = ("Zusätzliche Informationen", ["Rechnung " + inv.fields["invoice_number"]])
    block(right, top - 9 * mm, 8, 10, [account, note, payer])


def draw_letter(path: Path, inv: Invoice, look: Look) -> None:
    """A whole invoice on A4, on as many pages as it needs."""
    c = new_canvas(path, f"{look.words['title']} {inv.fields['invoice_number']}",
                   inv.vendor["name"], "Lato")
    pages = 2 if len(inv.lines) > 20 else 1
    draw_head(c, inv, look)
    y = draw_table_head(c, draw_parties(c, inv, look), look)
    page, so_far = 1, Decimal(0)
    for index, line in enumerate(inv.lines, 1):
        if y < look.bottom + 40:
            rule(c, LEFT, RIGHT, y + 11)
            draw_carry(c, y, look.words["carry_down"], so_far, look)
            draw_footer(c, inv, page, pages, look)
            c.showPage()
            page += 1
            if look.head == "side":
                c.setFillColor(HexColor(look.accent))
                c.rect(0, 0, 9, HEIGHT, stroke=0, fill=1)
            head = f"{look.words['title']} {inv.fields['invoice_number']}"
            put(c, LEFT, HEIGHT - 56, inv.vendor["name"], "Lato-Bold", 9)
            put(c, RIGHT, HEIGHT - 56, head, size=9, colour=GREY, align="right")
            y = draw_table_head(c, HEIGHT - 86, look)
            y = draw_carry(c, y, look.words["carry_up"], so_far, look)
        y = draw_row(c, y, index, line, inv, look)
        so_far += inv.net(line)
    rule(c, LEFT, RIGHT, y + 9, HexColor(look.accent), 0.8)
    y -= 18
    y = min(draw_payment(c, y, inv, look), draw_totals(c, y, inv, look)) - 12
    for text in look.notes:
        put(c, LEFT, y, filled(text, inv, look), size=9)
        y -= 13
    if page != pages or y < (105 * mm if look.slip else look.bottom - 12):
        raise SystemExit(f"{path.name}: does not fit")
    if look.slip:
        draw_slip(c, inv)
    else:
        draw_footer(c, inv, page, pages, look)
    c.save()


GERMAN_WORDS = {
    "title": "Rechnung", "bill_to": "", "pos": "Pos.", "description": "Bezeichnung",
    "quantity": "Menge", "unit": "Einheit", "price": "Einzelpreis", "rate": "USt.",
    "amount": "Betrag €", "percent": " %", "subtotal": "Nettobetrag",
    "tax": "zzgl. {rate} % USt. auf {base}", "total": "Rechnungsbetrag", "pay": "Zahlung",
    "tagline": "Möbel · Licht · Bürobedarf seit 1987",
}

LOOKS = {
    "invoice-de.pdf": (GERMAN, Look(
        words=GERMAN_WORDS, accent="#1f5f4a", head="plain", date_form="D.M.Y",
        show=lambda v: number(v, ".", ","), cash=lambda v: number(v, ".", ",") + " €",
        sender_line=True, epc=True, row=1.5,
        meta=[("Rechnungsnummer", "{invoice_number}"), ("Rechnungsdatum", "{issue_date}"),
              ("Leistungsdatum", "14.11.2025"), ("Fällig am", "{due_date}"),
              ("Ihre Bestellung", "{purchase_order}"), ("Kundennummer", "10442")],
        intro=["Rechnung {invoice_number}", "Sehr geehrte Frau Jörgensen,",
               "für unsere Lieferung vom 14. November 2025 erlauben wir uns zu berechnen:"],
        pay=[("IBAN", "{iban}"), ("BIC", "{bic}"),
             ("Zweck", "{invoice_number}")],
        notes=["{payment_terms} Die Ware bleibt bis zur vollständigen"
               " Bezahlung unser Eigentum.",
               "Vielen Dank für Ihren Auftrag. Bei Fragen erreichen Sie uns unter 0221 555 01 40."],
        footer=[["Grünfeld & Söhne", "Büroausstattung GmbH", "Lindenstraße 14", "50674 Köln"],
                ["Telefon 0221 555 01 40", "{email}",
                 "www.gruenfeld.example"],
                ["Geschäftsführerin: Käthe Grünfeld", "Amtsgericht Köln, HRB 98765",
                 "USt-IdNr. DE123456789"],
                ["Bankverbindung", "{iban}", "BIC {bic}"]])),
    "invoice-two-pages.pdf": (BRITISH, Look(
        words={"title": "Invoice", "bill_to": "INVOICE TO", "pos": "#",
               "description": "Description and product code", "quantity": "Qty", "unit": "Unit",
               "price": "Unit price", "rate": "VAT", "amount": "Net £", "percent": "%",
               "subtotal": "Subtotal", "discount": "Trade discount {}%",
               "tax": "VAT {rate}% on {base}", "total": "Total", "paid": "Deposit paid 26/09/2025",
               "due": "Amount due", "pay": "Payment by bank transfer", "page": "Page {} of {}",
               "carry_down": "Carried forward", "carry_up": "Brought forward",
               "tagline": "Timber, boards and ironmongery for the trade"},
        accent="#23395d", head="band", mark="ring", date_form="D/M/Y",
        show=lambda v: number(v, ",", "."), cash=lambda v: "£" + number(v, ",", "."),
        tax_line="VAT no. GB 888 8888 55",
        meta=[("Invoice number", "{invoice_number}"), ("Invoice date / tax point", "{issue_date}"),
              ("Due date", "{due_date}"), ("Your order", "{purchase_order}"),
              ("Account", "WHIT01"), ("Terms", "{payment_terms}")],
        pay=[("IBAN", "{iban}"), ("BIC", "{bic}"),
             ("Sort code", "60-16-13"), ("Account", "31926819"), ("Reference", "{invoice_number}")],
        notes=["Goods remain the property of Harrow & Finch Trade Supplies Ltd until paid for in"
               " full.", "Returns of stock items within 14 days, in original packing, please."],
        footer=[["Harrow & Finch Trade Supplies Ltd", "Unit 6, Old Tannery Yard",
                 "Leeds LS9 8AG, United Kingdom"],
                ["Telephone 0113 496 0148", "{email}"],
                ["Registered in England no. 01234567", "VAT no. GB 999 9999 73"]])),
    "invoice.jpeg": (POLISH, Look(
        words={"title": "Faktura VAT", "bill_to": "NABYWCA", "pos": "Lp.",
               "description": "Nazwa towaru lub usługi", "quantity": "Ilość", "unit": "J.m.",
               "price": "Cena netto", "rate": "VAT", "amount": "Netto zł", "percent": "%",
               "subtotal": "Razem netto", "tax": "VAT {rate}% od {base}",
               "total": "Razem brutto", "due": "Do zapłaty", "pay": "Płatność",
               "tagline": "ul. Źródlana 18, 90-312 Łódź · NIP 123-456-32-18"},
        accent="#a8431f", head="side", mark="bars", date_form="D.M.Y", row=5,
        show=lambda v: number(v, " ", ","), cash=lambda v: number(v, " ", ",") + " zł",
        tax_line="NIP 999-999-99-96",
        meta=[("Numer faktury", "{invoice_number}"), ("Data wystawienia", "{issue_date}"),
              ("Data sprzedaży", "22.09.2025"), ("Termin płatności", "{due_date}"),
              ("Sposób płatności", "{payment_terms}")],
        pay=[("Konto", "{iban}"), ("SWIFT", "{bic}"),
             ("Tytuł", "{invoice_number}")],
        notes=["Dziękujemy za zamówienie. Reklamacje przyjmujemy w ciągu 14 dni.", "",
               "Wystawiła: Małgorzata Wiśniewska"],
        footer=[["Żółta Łódź Drukarnia Sp. z o.o.", "ul. Źródlana 18", "90-312 Łódź"],
                ["NIP 123-456-32-18", "KRS 0000999999"],
                ["{email}", "tel. 42 555 01 63"]])),
    "invoice.webp": (FRENCH, Look(
        words={"title": "Facture", "bill_to": "FACTURÉ À", "pos": "N°",
               "description": "Désignation", "quantity": "Qté", "unit": "Unité",
               "price": "P.U. HT", "rate": "TVA", "amount": "Total HT €", "percent": " %",
               "subtotal": "Total HT", "discount": "Remise {} %",
               "tax": "TVA {rate} % sur {base}", "total": "Total TTC", "pay": "Règlement",
               "tagline": "Graphisme & signalétique"},
        accent="#5b3a78", head="plain", mark="ring", date_form="D/M/Y", row=5,
        show=lambda v: number(v, " ", ","), cash=lambda v: number(v, " ", ",") + " €",
        tax_line="TVA FR 83 404833048",
        meta=[("Facture n°", "{invoice_number}"), ("Date d’émission", "{issue_date}"),
              ("Échéance", "{due_date}"), ("Bon de commande", "{purchase_order}"),
              ("Conditions", "{payment_terms}")],
        pay=[("IBAN", "{iban}"), ("BIC", "{bic}")],
        notes=["En cas de retard de paiement : pénalités au taux légal et indemnité forfaitaire"
               " de 40 €.", "Pas d’escompte pour règlement anticipé."],
        footer=[["Atelier Bérénice Forêt SARL", "8 bis rue de l’Église", "69005 Lyon"],
                ["SIREN 732 829 320 RCS Lyon", "Capital social 8 000 €",
                 "TVA FR 44 732829320"],
                ["{email}", "04 55 50 10 87"]])),
    "invoice.heic": (SWISS, Look(
        words={**GERMAN_WORDS, "rate": "MWST", "amount": "Betrag CHF", "percent": "%",
               "subtotal": "Zwischentotal", "tax": "MWST {rate}% auf {base}",
               "total": "Total CHF", "pay": "Zahlung", "bill_to": "",
               "tagline": "Mühlegasse 9, 3011 Bern · CHE-123.456.788 MWST"},
        accent="#0f6674", head="plain", mark="peaks", date_form="D.M.Y",
        show=lambda v: number(v, "’", "."), cash=lambda v: number(v, "’", "."),
        sender_line=True, slip=True, row=0.5,
        meta=[("Rechnung Nr.", "{invoice_number}"), ("Datum", "{issue_date}"),
              ("Zahlbar bis", "{due_date}"), ("Konditionen", "{payment_terms}"),
              ("Leistung", "25.08.2025")],
        pay=[("Konto", "{iban}"),
             ("E-Mail", "{email}"), ("Telefon", "031 555 01 84")],
        notes=["Herzlichen Dank für Ihren Auftrag und gute Fahrt!"], footer=[])),
}


# ------------------------------------------------------------------- the Japanese invoice


def draw_japanese(path: Path, inv: Invoice) -> None:
    """A qualified invoice (two tax rates, registration number) as it is usual in Japan."""
    c = new_canvas(path, "請求書 " + inv.fields["invoice_number"], inv.vendor["name"], "IPAex")
    navy = HexColor("#2b3f63")

    def yen(value: Decimal) -> str:
        return "¥" + number(value, ",", ".")

    def jp(x: float, y: float, text: str, size: float = 9, colour: Color = INK,
           align: str = "left") -> None:
        put(c, x, y, text, "IPAex", size, colour, align)

    c.saveState()  # the spacing of the title must not reach what follows
    title = c.beginText(WIDTH / 2 - 66, HEIGHT - 78)
    title.setFont("IPAex", 26, 26)
    title.setCharSpace(27)
    title.setFillColor(navy)
    title.textOut("請求書")
    c.drawText(title)
    c.restoreState()
    rule(c, LEFT, RIGHT, HEIGHT - 94, navy, 1.4)
    rule(c, LEFT, RIGHT, HEIGHT - 97, navy, 0.4)

    y = HEIGHT - 132
    jp(LEFT, y, inv.customer["name"] + " 御中", 14)
    rule(c, LEFT, LEFT + 236, y - 6, INK, 0.7)
    zip_code, rest = inv.customer["address"].split(" ", 1)
    jp(LEFT, y - 24, zip_code)
    jp(LEFT, y - 37, rest)
    jp(LEFT, y - 66, "下記のとおりご請求申し上げます。", 9.5)

    x = RIGHT - 196
    for label, value in (
        ("請求書番号", inv.fields["invoice_number"]),
        ("発行日", date_print(inv.fields["issue_date"], "Y年M月D日")),
        ("お支払期限", date_print(inv.fields["due_date"], "Y年M月D日")),
    ):
        jp(x, y + 6, label, colour=GREY)
        jp(RIGHT, y + 6, value, align="right")
        rule(c, x, RIGHT, y + 1)
        y -= 16
    y -= 10
    zip_code, rest = inv.vendor["address"].split(" ", 1)
    street, building = rest.split(" ")
    jp(x, y, inv.vendor["name"], 12)
    for i, text in enumerate((zip_code, street, building, "TEL 022-555-0127",
                              inv.vendor["email"], "登録番号 " + inv.vendor["tax_id"])):
        jp(x, y - 17 - 13 * i, text, 8.5)
    c.saveState()  # the seal, over the name as it should be
    c.setStrokeColor(HexColor("#c8372d"))
    c.setLineWidth(1.6)
    c.setStrokeAlpha(0.85)
    c.setFillAlpha(0.85)
    c.roundRect(RIGHT - 46, y - 46, 44, 44, 3, stroke=1, fill=0)
    for i, column in enumerate(("文具印", "あおば")):
        for j, sign in enumerate(column):
            put(c, RIGHT - 34 + 20 * (1 - i) - 0.5, y - 15.5 - 13 * j, sign, "IPAex", 12,
                HexColor("#c8372d"), "centre")
    c.restoreState()

    y = HEIGHT - 262
    c.setFillColor(HexColor("#eef1f6"))
    c.setStrokeColor(navy)
    c.setLineWidth(0.9)
    c.rect(LEFT, y - 10, 236, 34, stroke=1, fill=1)
    jp(LEFT + 12, y + 2, "ご請求金額(税込)", 10)
    put(c, LEFT + 224, y, yen(inv.totals["total"]), "IPAex", 18, navy, "right")

    edges = [LEFT, LEFT + 62, LEFT + 266, LEFT + 308, LEFT + 346, LEFT + 412, RIGHT]
    names = ["品番", "品名", "数量", "単位", "単価", "金額"]
    y -= 46
    height, top = 22.0, y + 14
    c.setFillColor(navy)
    c.rect(LEFT, y - 8, RIGHT - LEFT, height, stroke=0, fill=1)
    for i, name in enumerate(names):
        jp((edges[i] + edges[i + 1]) / 2, y - 1, name, 9, white, "centre")
    rows = [*inv.lines, *[None] * (10 - len(inv.lines))]  # empty rows, as on a printed form
    for line in rows:
        y -= height
        rule(c, LEFT, RIGHT, y - 8)
        if line is None:
            continue
        mark = " ※" if line.rate == "8" else ""
        jp(edges[0] + 5, y - 1, line.code or "", 7.5, GREY)
        jp(edges[1] + 5, y - 1, line.description + mark)
        jp(edges[3] - 5, y - 1, line.quantity, align="right")
        jp((edges[3] + edges[4]) / 2, y - 1, line.unit or "", align="centre")
        jp(edges[5] - 5, y - 1, number(line.price, ",", "."), align="right")
        jp(edges[6] - 5, y - 1, number(inv.net(line), ",", "."), align="right")
    c.setStrokeColor(HAIR)
    for x in edges:
        c.line(x, top, x, y - 8)
    c.setStrokeColor(navy)
    c.setLineWidth(0.9)
    c.rect(LEFT, y - 8, RIGHT - LEFT, top - y + 8, stroke=1, fill=0)

    y -= 30
    jp(LEFT, y, "※ は軽減税率(8%)対象品目です。", 8, GREY)
    x, below = RIGHT - 236, y
    pairs = [("小計(税抜)", inv.totals["subtotal"])]
    for tax in inv.taxes:
        pairs.append((f"{tax['rate']}%対象 {yen(tax['base'])} 消費税", tax["amount"]))
    pairs.append(("消費税合計", inv.totals["tax"]))
    for label, value in pairs:
        jp(x, y, label)
        jp(RIGHT - 5, y, yen(value), align="right")
        rule(c, x, RIGHT, y - 6)
        y -= 19
    y -= 5
    c.setFillColor(navy)
    c.rect(x - 6, y - 9, RIGHT - x + 6, 24, stroke=0, fill=1)
    jp(x, y - 1, "合計(税込)", 10.5, white)
    jp(RIGHT - 5, y - 1, yen(inv.totals["total"]), 12, white, "right")
    jp(x, y - 28, "今回お支払額", 10)
    jp(RIGHT - 5, y - 28, yen(inv.totals["amount_due"]), 10, align="right")

    y = below - 26
    c.setStrokeColor(HAIR)
    c.roundRect(LEFT, y - 62, 222, 74, 3, stroke=1, fill=0)
    for i, text in enumerate(("お振込先", "あおば銀行 仙台中央支店", "普通 1234567",
                              "口座名義 カ)アオバブング")):
        jp(LEFT + 10, y - 4 - 15.5 * i, text, 9, navy if i == 0 else INK)

    y = 128
    c.rect(LEFT, y - 36, RIGHT - LEFT, 58, stroke=1, fill=0)
    jp(LEFT + 10, y + 6, "備考", 9, navy)
    jp(LEFT + 10, y - 9, inv.fields["payment_terms"])
    jp(LEFT + 10, y - 23, "恐れ入りますが、振込手数料はご負担くださいますようお願いいたします。")
    jp(WIDTH / 2, 60, "1 / 1", 8, GREY, "centre")
    c.save()


# ---------------------------------------------------------------------------- the receipt


def draw_receipt(path: Path, inv: Invoice) -> None:
    """A till receipt on 80 mm paper."""
    width, height = 80 * mm, 163 * mm
    c = new_canvas(path, "Receipt", inv.vendor["name"], "Mono", (width, height))
    left, right, mid = 5 * mm, width - 5 * mm, width / 2
    ink = HexColor("#2a2a2e")
    y = height - 34

    def centre(text: str, size: float = 8, font: str = "Mono", step: float = 11) -> None:
        nonlocal y
        put(c, mid, y, text, font, size, ink, "centre")
        y -= step

    def pair(a: str, b: str, font: str = "Mono", size: float = 8, step: float = 11.5) -> None:
        nonlocal y
        put(c, left, y, a, font, size, ink)
        put(c, right, y, b, font, size, ink, "right")
        y -= step

    def dashes() -> None:
        nonlocal y
        c.setDash(2, 2)
        rule(c, left, right, y + 4, ink, 0.7)
        c.setDash()
        y -= 9

    centre("JUNIPER STREET", 15, "Mono-Bold", 16)
    centre("HARDWARE", 15, "Mono-Bold", 15)
    centre("1180 Juniper Street")
    centre("Portland, ME 04101")
    centre("(207) 555-0142", step=16)
    pair("09/18/2025  4:52 PM", "REG 004")
    pair("RECEIPT " + inv.fields["invoice_number"], "", step=13)
    dashes()
    for line in inv.lines:
        pair(line.description, number(inv.net(line), ",", "."))
        detail = f"  {line.code}"
        if line.quantity != "1":
            detail += f"   {line.quantity} @ {line.price}"
        put(c, left, y, detail, "Mono", 7, HexColor("#55555a"))
        y -= 13
    dashes()
    total = inv.totals["total"]
    pair("SUBTOTAL", number(inv.totals["subtotal"], ",", "."))
    pair("SALES TAX 5.5%", number(inv.totals["tax"], ",", "."), step=17)
    pair("TOTAL USD", f"${total}", "Mono-Bold", 13, 17)
    pair("VISA ************4242", f"{inv.totals['amount_paid']}")
    pair("AUTH 083192", "APPROVED", step=14)
    dashes()
    centre(f"ITEMS SOLD: {sum(int(n.quantity) for n in inv.lines)}", step=14)
    centre("Returns within 30 days with receipt", 7.2, step=10)
    centre("Thank you for shopping local!", 8, step=14)
    bars = code128.Code128(inv.fields["invoice_number"].replace("-", ""), barHeight=28,
                           barWidth=1.0, quiet=0)
    bars.drawOn(c, mid - bars.width / 2, y - 22)
    y -= 33
    centre(inv.fields["invoice_number"], 7)
    c.save()


# ---------------------------------------------------------------------------- the pictures


def run(*command: str | Path) -> None:
    """Run a tool and stop when it fails."""
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)


def render(pdf: Path, dpi: int) -> Path:
    """The first page of a PDF as PNG, beside it."""
    run("pdftoppm", "-png", "-singlefile", "-r", str(dpi), pdf, pdf.with_suffix(""))
    return pdf.with_suffix(".png")


def to_png(page: Path, out: Path) -> None:
    """A clean crop in 16 greys."""
    run("convert", page, "-colorspace", "Gray", "-dither", "None", "-depth", "4", "-strip",
        "-define", "png:exclude-chunks=date,time", "-define", "png:compression-level=9", out)


def to_jpeg(page: Path, out: Path) -> None:
    """A flatbed scan: a little askew, warm paper; progressive, with EXIF."""
    flat = page.with_suffix(".ppm")
    run("convert", page, "-background", "white", "-virtual-pixel", "Background", "-distort", "SRT",
        "0.55", "-blur", "0x0.4", "(", "+clone", "-sparse-color", "Bilinear",
        "0,0 #fffefb 992,1403 #f1ebdf", ")", "-compose", "Multiply", "-composite", flat)
    run("cjpeg", "-quality", "54", "-progressive", "-optimize", "-sample", "2x2", "-outfile",
        out, flat)
    run("exiftool", "-q", "-overwrite_original", "-Make=Example", "-Model=Flatbed 120",
        "-Software=scan", "-Orientation#=1", "-XResolution=120", "-YResolution=120",
        "-ResolutionUnit=inches", "-DateTimeOriginal=2025:09:29 10:14:07",
        "-CreateDate=2025:09:29 10:14:07", "-ImageDescription=FV/2025/09/0163", out)


def to_webp(page: Path, out: Path) -> None:
    """A lossy export of the page."""
    run("cwebp", "-quiet", "-q", "62", "-m", "6", "-metadata", "none", page, "-o", out)


def to_heic(page: Path, out: Path) -> None:
    """A photograph of the sheet on a desk, from slightly above."""
    shot = page.with_name("shot.png")
    sheet = page.with_name("sheet.png")
    corners = "0,0 104,92  %d,0 1108,120  %d,%d 1150,1506  0,%d 52,1476"
    size = subprocess.run(["identify", "-format", "%w %h", str(page)], check=True,
                          capture_output=True, text=True).stdout.split()
    w, h = int(size[0]) - 1, int(size[1]) - 1
    run("convert", page, "-alpha", "set", "-virtual-pixel", "Transparent", "-define",
        "distort:viewport=1200x1600+0+0", "-distort", "Perspective", corners % (w, w, h, h), sheet)
    run("convert", "-size", "1200x1600", "-seed", "7", "gradient:#9a7a5b-#7d6046",
        "(", "-size", "1600x1600", "xc:gray50", "-attenuate", "0.9", "+noise", "Gaussian",
        "-colorspace", "Gray", "-motion-blur", "0x60+0", "-gravity",
        "center", "-crop", "1200x1600+0+0", "+repage", "-gravity", "northwest", "-auto-level",
        "-blur", "0x1.2", ")",
        "-compose", "SoftLight", "-composite",
        "(", sheet, "-background", "#1c120a", "-shadow", "70x14+10+16", ")",
        "-compose", "Over", "-geometry", "-18-12", "-composite",
        sheet, "-geometry", "+0+0", "-composite",
        "(", "-size", "1200x1600", "xc:white", "-sparse-color", "Bilinear",
        "0,0 #fffdf8 1200,0 #f4efe6 1200,1600 #cdc6ba 0,1600 #e6e0d5", ")",
        "-compose", "Multiply", "-composite", "-strip", shot)
    run("heif-enc", "-q", "38", "-o", out, shot)


def main() -> None:
    """Write every sample and expected.json into the directory."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
    for name, file in FONTS.items():
        pdfmetrics.registerFont(TTFont(name, file))
    shapes.STATE_DEFAULTS["fontName"] = "Lato"  # or a QR code names a font that is not embedded
    pictures = {"invoice.jpeg": (to_jpeg, 120), "invoice.webp": (to_webp, 120),
                "invoice.heic": (to_heic, 140)}
    expected = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, (inv, look) in LOOKS.items():
            expected[name] = inv.expected()
            if name.endswith(".pdf"):
                draw_letter(out / name, inv, look)
                continue
            pdf = Path(scratch) / (name.replace(".", "-") + ".pdf")
            draw_letter(pdf, inv, look)
            convert, dpi = pictures[name]
            convert(render(pdf, dpi), out / name)
        pdf = Path(scratch) / "receipt.pdf"
        draw_receipt(pdf, RECEIPT)
        to_png(render(pdf, 203), out / "receipt.png")
    expected["receipt.png"] = RECEIPT.expected()
    draw_japanese(out / "invoice-ja.pdf", JAPANESE)
    expected["invoice-ja.pdf"] = JAPANESE.expected()
    text = json.dumps(dict(sorted(expected.items())), ensure_ascii=False, indent=2)
    (out / "expected.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
