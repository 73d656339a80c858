"""Draws the diagrams of the course: vit-00.svg to vit-06.svg, block.svg and heads.svg.

python notebooks/figures/diagrams.py

All views of the ViT come from `vit`, with the numbers of the model that a chapter uses and a mark where
it is. The drawings bring their own light background, so that they can be read on a dark page too.
"""

from pathlib import Path
from xml.sax.saxutils import escape

from vitlib.model import ViTModel, create_model

BLUE, ORANGE, GREEN, YELLOW = "#0072B2", "#D55E00", "#009E73", "#E69F00"
INK, GREY, PAPER, PALE = "#1a1a1a", "#5f5f5f", "#fcfbf8", "#e8f1f8"


FONT = "Helvetica, Arial, DejaVu Sans, sans-serif"
FIXED = "DejaVu Sans Mono, Menlo, Consolas, monospace"
TIP = (
    '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
    'orient="auto"><path d="M0 0 L10 5 L0 10 z" fill="context-stroke"/></marker></defs>'
)


def drawing(width: int, height: int, title: str, description: str, *parts: str) -> str:
    """Return an SVG file, with a title and a description for those who cannot see it."""
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="{FONT}">'
    words = f"<title>{escape(title)}</title>\n<desc>{escape(' '.join(description.split()))}</desc>"
    return "\n".join(
        (head, words, TIP, rect(0, 0, width, height, PAPER, round=10), *filter(None, parts), "</svg>\n")
    )


def rect(x, y, width, height, fill="none", stroke="none", opacity=1.0, round=0) -> str:
    size = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{round}"'
    return f'<rect {size} fill="{fill}" fill-opacity="{opacity:.3g}" stroke="{stroke}"/>'


def text(x, y, words, size=13, colour=INK, anchor="middle", weight="normal", font=FONT) -> str:
    style = f'font-size="{size}" fill="{colour}" text-anchor="{anchor}" font-weight="{weight}"'
    lines = "".join(
        f'<tspan x="{x:g}" y="{y + 1.25 * size * number:g}">{escape(line)}</tspan>'
        for number, line in enumerate(str(words).split("\n"))
    )
    return f'<text {style} font-family="{font}">{lines}</text>'


def box(x, y, width, height, words="", fill="white", stroke=INK, colour=INK) -> str:
    first = y + height / 2 + 13 * (0.36 - 0.625 * words.count("\n"))
    return rect(x, y, width, height, fill, stroke, round=4) + text(
        x + width / 2, first, words, colour=colour
    )


def line(*points, colour=INK, width=1.5, tip=True, dashes="none") -> str:
    """Return a line through points (x, y), with a tip at its end."""
    path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
    style = (
        f'stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dashes}" stroke-linejoin="round"'
    )
    end = ' marker-end="url(#tip)"' if tip else ""
    return f'<path d="{path}" fill="none" {style}{end}/>'


def plus(x, y, colour=INK) -> str:
    cross = line((x - 5, y), (x + 5, y), tip=False) + line((x, y - 5), (x, y + 5), tip=False)
    return f'<circle cx="{x}" cy="{y}" r="9" fill="white" stroke="{colour}" stroke-width="1.5"/>{cross}'


def numbers(x, y, cells, colour, seed, cell=10, height=16) -> str:
    """Return a row of cells in shades of a colour: a vector."""
    shades = [0.25 + 0.75 * ((seed * 37 + n * 61 + seed * n * 17) % 23) / 22 for n in range(cells)]
    drawn = [
        rect(x + cell * n, y, cell, height, colour, opacity=shade) for n, shade in enumerate(shades)
    ]
    return "".join(drawn) + rect(x, y, cell * cells, height, stroke=INK)


def label(x, y, name, shape, sizes="") -> str:
    parts = [text(x, y, name, weight="bold"), text(x, y + 17, shape, colour=BLUE)]
    return "".join(parts) + (text(x, y + 33, sizes, 12, GREY) if sizes else "")


def mark(x, y, width, height, words) -> tuple[str, str]:
    """Return the mark "you are here" for a part: what lies under it, and the words over it."""
    tag = 8 * len(words) + 12
    left, top = min(x + 12, 692 - tag), y - 12
    zone = rect(x, y, width, height, YELLOW, opacity=0.13, round=8)
    zone += f'<g stroke-width="2">{rect(x, y, width, height, stroke=ORANGE, round=8)}</g>'
    if height < 100:  # a part inside the encoder: the words stand above its frame
        zone += line((x + 20, y), (x + 20, y - 30), colour=ORANGE, width=2, tip=False)
        top = y - 44
    return zone, box(left, top, tag, 22, words, ORANGE, ORANGE, "white")


def picture() -> str:
    """Return the picture that goes through the model, 104 pixels wide: a sun, a hill and a sheep."""
    wool = ((44, 62), (54, 57), (64, 61), (55, 67))
    return (
        f'{rect(0, 0, 104, 104, "#9cc4e4")}<circle cx="16" cy="15" r="13" fill="#f2c230"/>'
        '<path d="M0 84 Q58 56 104 86 V104 H0 z" fill="#6aa84f"/>'
        '<path d="M49 70 V82 M60 70 V82" stroke="#333" stroke-width="3"/>'
        + "".join(f'<circle cx="{x}" cy="{y}" r="9" fill="white"/>' for x, y in wool)
        + '<ellipse cx="73" cy="55" rx="6" ry="7" fill="#333"/>'
    )


def piece(x, y, number, grid, side) -> str:
    """Return one patch of the picture, `side` pixels wide."""
    row, column = divmod(number, grid)
    step = 104 / grid
    view = f"{column * step:g} {row * step:g} {step:g} {step:g}"
    size = f'x="{x}" y="{y}" width="{side}" height="{side}"'
    return f'<svg {size} viewBox="{view}">{picture()}</svg>{rect(x, y, side, side, stroke=INK)}'


def vit(chapter: str, model: ViTModel | None) -> str:
    """Draw the whole ViT for a chapter, with the numbers of its model and the mark."""
    config = model.config if model else {"image_size": 32, "patch_size": 4}
    S, P = config["image_size"], config["patch_size"]
    grid = S // P
    N, sizes = grid**2, dict.fromkeys(("images", "patches", "tokens", "blocks", "logits"), "")
    if model:
        C, D, H = config["num_channels"], config["em_dim"], config["num_heads"]
        sizes = {
            "images": f"C = {C}, S = {S}",
            "patches": f"N = {N}, P = {P}",
            "tokens": f"T = N + 1 = {N + 1}, D = {D}",
            "blocks": f"L = {config['num_layers']}, H = {H}, K = D / H = {D // H}",
            "logits": f"{config['num_classes']:,} classes",
        }
    everything, height = (8, 52, 684, 408), 472
    here = {
        "00": (*everything, "you are here: 00, the whole way"),
        "01": (8, 52, 684, 194, "you are here: 01, patches and tokens"),
        "02": (40, 272, 372, 188, "you are here: 02, attention and the block"),
        "03": (*everything, "you are here: 03, every weight is trained"),
        "04": (586, 324, 106, 136, "you are here: 04, a new head"),
        "05": (122, 310, 100, 50, "you are here: 05, attention"),
        "06": (*everything, "you are here: 06, at full size"),
    }
    zone, tag = mark(*here[chapter])
    rows = {66: None, 94: 0, 119: 1, 144: "⋮", 169: N - 1}
    parts = [
        zone if chapter != "05" else "",
        text(20, 25, "A Vision Transformer, from images to classes", 16, anchor="start", weight="bold"),
    ]
    # images
    parts += [f'<g transform="translate(24 78)">{picture()}']
    step = 104 / grid
    for n in range(grid + 1):
        parts += [
            f'<path d="M{n * step:g} 0 V104 M0 {n * step:g} H104" stroke="white" stroke-width="0.8"/>'
        ]
    parts += ["</g>", label(76, 204, "images", "B × C × S × S", sizes["images"])]
    parts += [line((134, 130), (164, 130)), text(148, 122, "cut", 12)]
    # patches, tokens, positions
    for seed, (y, number) in enumerate(rows.items()):
        if number == "⋮":
            parts += [text(x, y + 14, "⋮", 16) for x in (182, 345, 465, 585)]
            continue
        if number is None:
            parts += [text(298, y + 13, "CLS", 12, anchor="end")]
        else:
            parts += [piece(172, y - 2, number, grid, 20), line((230, y + 8), (300, y + 8), colour=GREY)]
            parts += [
                text(198, y + 13, number if number != N - 1 or model else "N−1", 12, anchor="start")
            ]
        colour = ORANGE if number is None else BLUE
        parts += [numbers(305, y, 8, colour, seed), numbers(425, y, 8, GREEN, seed + 7)]
        parts += [numbers(545, y, 8, colour, seed + 3)]
    parts += [text(261, 156, "linear layer", 12), text(405, 135, "+", 20), text(525, 135, "=", 20)]
    parts += [label(196, 204, "patches", "B × N × C·P·P", sizes["patches"])]
    parts += [
        label(345, 204, "tokens", "B × T × D", sizes["tokens"]),
        label(465, 204, "positions", "T × D", ""),
    ]
    parts += [label(585, 204, "with positions", "B × T × D", "")]
    parts += [
        line((634, 130), (676, 130), (676, 259), (26, 259), (26, 366), (50, 366), width=2.5, colour=BLUE)
    ]
    # encoder: the residual stream and its two branches
    for shift in (10, 5, 0):
        parts += [box(50 + shift, 290 - shift, 340, 110, fill=PALE, stroke=BLUE)]
    parts += [text(352, 306, "L blocks", 13, BLUE, weight="bold")]
    parts += [line((52, 366), (446, 366), width=2.5, colour=BLUE)]
    parts += [zone if chapter == "05" else ""]
    for x, words, width, end in ((66, "attention,\nH heads", 78, 232), (248, "MLP", 44, 374)):
        parts += [line((x, 366), (x, 336), (x + 8, 336)), box(x + 10, 322, 44, 28, "norm")]
        parts += [line((x + 54, 336), (x + 64, 336)), box(x + 66, 318, width, 36, words, fill="white")]
        parts += [line((x + 66 + width, 336), (end, 336), (end, 356)), plus(end, 366, BLUE)]
    parts += [label(220, 420, "blocks", "B × T × D, in and out", sizes["blocks"])]
    # head
    parts += [box(450, 346, 48, 40, "final\nnorm"), line((498, 366), (516, 366))]
    parts += [numbers(518, 358, 6, ORANGE, 5, cell=9), text(545, 350, "CLS", 12)]
    parts += [
        line((572, 366), (588, 366)),
        box(590, 346, 46, 40, "linear\nlayer"),
        line((636, 366), (650, 366)),
    ]
    for n, length in enumerate((6, 30, 10, 4, 8)):
        parts += [rect(654, 343 + 9 * n, length, 7, ORANGE if n == 1 else GREY)]
    parts += [label(545, 420, "CLS alone", "B × D", "")]
    parts += [label(642, 420, "logits", "B × classes", sizes["logits"])]
    if chapter == "03":
        height = 506
        parts += [
            line((668, 464), (668, 487), (26, 487), (26, 468), colour=ORANGE, width=2, dashes="6 4")
        ]
        words = "loss: compare with the true class; its gradient goes back"
        parts += [box(134, 476, 432, 22, words, PAPER, PAPER)]
    description = """
        Images [B, C, S, S] are cut into N patches of C P P numbers. A linear layer makes
        a token of width D of each patch, the CLS token joins in front, positions are
        added: [B, T, D] with T = N + 1. L blocks follow, each with norm, attention of H
        heads and a sum, then norm, MLP and a sum. After a final norm the CLS token goes
        through a linear layer, which gives a logit for each class.
    """
    return drawing(700, height, f"The Vision Transformer, {here[chapter][4]}", description, *parts, tag)


def block() -> str:
    """Draw an encoder block twice: with its norms on the branches, and on the stream."""
    parts = [text(175, 28, "Pre-norm", 16, weight="bold"), text(525, 28, "Post-norm", 16, weight="bold")]
    parts += [
        text(175, 48, "the ViT paper", 13, GREY),
        text(525, 48, "the first Transformer, and the published system", 13, GREY),
    ]
    parts += [line((350, 20), (350, 492), colour="#cccccc", tip=False, width=1)]
    mlp = "MLP: linear D to M,\nGELU, linear M to D"
    for x, before in ((110, True), (460, False)):
        parts += [
            text(x, 80, "tokens, B × T × D", 13, BLUE),
            line((x, 90), (x, 414), colour=BLUE, width=3),
        ]
        parts += [text(x, 436, "tokens, B × T × D", 13, BLUE)]
        for top, words, height in ((104, "attention,\nH heads", 40), (252, mlp, 40)):
            middle, y = x + 140, top + 50 if before else top + 14
            parts += [line((x, top), (middle, top), (middle, top + 12 if before else y))]
            if before:
                parts += [
                    box(middle - 45, top + 12, 90, 24, "norm", PALE, BLUE),
                    line((middle, top + 36), (middle, y)),
                ]
            end = y + height + 22
            parts += [
                box(middle - 80, y, 160, height, words),
                line((middle, y + height), (middle, end), (x + 9, end)),
            ]
            parts += [plus(x, end, BLUE)]
            if not before:
                parts += [box(x - 45, end + 20, 90, 24, "norm", PALE, BLUE)]
    code = {
        175: "x = x + attention(norm(x))\nx = x + mlp(norm(x))",
        525: "x = norm(x + attention(x))\nx = norm(x + mlp(x))",
    }
    for x, lines in code.items():
        parts += [text(x, 470, lines, font=FIXED)]
    description = """
        Two encoder blocks side by side. In both the tokens run down a straight line, the
        residual stream, from which two branches leave and to which their results are
        added: attention, then the MLP of a linear layer from D to M, GELU, and a linear
        layer from M to D. With pre-norm a layer norm is the first thing on each branch,
        and the stream is only added to. With post-norm the layer norm stands on the
        stream, behind each sum.
    """
    return drawing(700, 502, "An encoder block, pre-norm and post-norm", description, *parts)


def matrix(x, y, colours, seed=0, rows=4, cell=11) -> str:
    """Return a matrix with a colour for each column."""
    drawn = ""
    for column, colour in enumerate(colours):
        for row in range(rows):
            shade = 0.2 + 0.8 * ((seed * 31 + row * 53 + column * 29 + row * column * 7) % 19) / 18
            drawn += rect(x + cell * column, y + cell * row, cell, cell, colour, opacity=shade)
    return drawn + rect(x, y, cell * len(colours), cell * rows, stroke=INK)


def heads() -> str:
    """Draw multi-head attention with three heads: project, split, score, normalise, mix, merge."""
    colours = (BLUE, ORANGE, GREEN)
    wide = [colour for colour in colours for _ in range(2)]
    steps = {  # centre: name, what is done, shape
        46: ("tokens", "", "B × T × D"),
        142: ("Project", "three linear\nlayers", "B × T × D"),
        252: ("Split", "columns to\nH heads", "B × H × T × K"),
        358: ("Score", "q kᵀ / √K", "B × H × T × T"),
        462: ("Normalise", "softmax of\neach row", "B × H × T × T"),
        560: ("Mix", "weights · v", "B × H × T × K"),
        650: ("Merge", "and a linear\nlayer", "B × T × D"),
    }
    parts = [
        text(20, 28, "Attention with H heads of width K = D / H", 16, anchor="start", weight="bold")
    ]
    for x, (name, done, shape) in steps.items():
        parts += [text(x, 62, name, 14, weight="bold"), text(x, 82, done, 12, GREY)]
        parts += [text(x, 372, shape, 12, BLUE)]
    parts += [matrix(13, 198, ["#555555"] * 6)]
    for y in (140, 220, 300):
        parts += [line((84, 220), (92, 220), (92, y), (104, y))]
    for seed, (y, name) in enumerate(zip((118, 198, 278), "qkv", strict=True)):
        parts += [matrix(109, y, wide, seed=seed + 1), text(142, y + 60, name, 14)]
    for y in (140, 220, 300):  # every head takes its columns of q, of k and of v
        parts += [line((180, y), (190, y), (190, 220), tip=False), line((190, 220), (190, y), (206, y))]
    for seed, (y, colour) in enumerate(zip((118, 198, 278), colours, strict=True)):
        for place, name in ((213, "q"), (241, "k"), (269, "v")):
            parts += [
                matrix(place, y, [colour] * 2, seed=seed + place),
                text(place + 11, y + 60, name, 14),
            ]
        parts += [line((300, y + 22), (328, y + 22)), matrix(336, y, [colour] * 4, seed=seed + 9)]
        below = ((304, y + 36), (304, y + 56), (518, y + 56), (518, y + 34))  # the way of the values
        parts += [line((293, y + 36), *below, (541, y + 34), colour=GREY)]
        parts += [line((388, y + 22), (432, y + 22)), matrix(440, y, [colour] * 4, seed=seed + 11)]
        parts += [
            line((492, y + 22), (541, y + 22)),
            text(411, y + 72, "v", 12, GREY),
            matrix(549, y, [colour] * 2, seed=seed + 14),
        ]
        parts += [line((578, y + 22), (596, y + 22), (596, 220), (610, 220), tip=seed == 1)]
    parts += [matrix(617, 198, wide, seed=20)]
    description = """
        From left to right: tokens [B, T, D] go through three linear layers and become
        queries, keys and values. Their columns are split among H heads, three in the
        drawing, each in its own colour, K = D / H columns wide. Every head has its own T
        x T scores, queries times keys divided by the square root of K, and a softmax over
        each row. The weights mix the values to [B, H, T, K]. The heads' results are
        merged side by side to [B, T, D], and a last linear layer follows.
    """
    return drawing(700, 392, "Attention with several heads", description, *parts)


if __name__ == "__main__":
    folder = Path(__file__).parent
    mini, finetuned, large = (
        create_model("mini", 100),
        create_model("mini", 10),
        create_model("B/16", 1000),
    )
    models = {"00": None, "01": mini, "02": mini, "03": mini, "04": finetuned, "05": mini, "06": large}
    files = {f"vit-{chapter}": vit(chapter, model) for chapter, model in models.items()}
    files |= {"block": block(), "heads": heads()}
    for name, content in files.items():
        (folder / f"{name}.svg").write_text(content, encoding="utf-8")
