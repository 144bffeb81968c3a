"""The verb `demo-page`: write a page of static files that runs a model in a browser."""

import sys
from pathlib import Path

from tq_lightning.cli.export import packed_file
from tq_lightning.cli.parser import Parser
from tq_lightning.errors import UserError

MOST_EXAMPLES = 12


def parser() -> Parser:
    """Build the parser of the verb."""
    p = Parser("demo-page", description="Write a page that runs a packed file in a browser.")
    p.add_argument(
        "model", metavar="MODEL", type=Path, help="packed file, or training checkpoint (.ckpt)"
    )
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the page; an existing page is replaced",
    )
    p.add_argument(
        "--images",
        type=Path,
        help=f"image or folder of images to use as examples on the page, at most {MOST_EXAMPLES}",
    )
    p.add_argument(
        "--model.name",
        dest="factory",
        metavar="PACKAGE.MODULE:FACTORY",
        help="factory that MODEL names; it is imported only if you pass it",
    )
    p.add_argument("--title", help="title of the page (default: the name of the model)")
    p.add_argument(
        "--onnxruntime-web",
        type=Path,
        metavar="FOLDER",
        help="folder dist/ of the npm package onnxruntime-web (default: fetch it with npm)",
    )
    return p


def main(argv: list[str]) -> int:
    """Write a page.

    Args:
        argv: arguments after the verb.

    Returns:
        Exit status 0.

    Raises:
        UserError: wrong arguments, a file that is not a model, a network that ONNX can't express,
            or a runtime that can't be fetched.
    """
    args = parser().parse_args(argv)
    if not args.model.is_file():
        raise UserError(f"no file {args.model}; pass a packed file or a training checkpoint")
    try:
        from tq_lightning.export.demo_page.write import check_out, write_demo_page
    except ImportError as error:
        raise UserError(
            f"demo-page needs onnx and onnxscript ({error}); pip install 'tq_lightning[onnx]'"
        ) from error
    check_out(args.out)
    with packed_file(args.model, args.factory) as (path, _):
        sizes = write_demo_page(
            path,
            args.out,
            title=args.title,
            examples=_examples(args.images),
            runtime=args.onnxruntime_web,
            model=args.factory,
        )
    print(f"wrote {args.out} ({len(sizes)} files, {sum(sizes.values()):,} bytes)")
    print(f"serve it, for example: python -m http.server --directory {args.out}")
    return 0


def _examples(path: Path | None) -> list[Path]:
    """Return the first images below a folder that browsers can display, or the image itself.

    One line on standard error counts the images that can't be read.
    """
    from tq_lightning.cli.classify import find_images
    from tq_lightning.data.images import UnreadableImage, escape_undecodable, read_image

    shown = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
    if path is None:
        return []
    found = [image for image in find_images(path) if image.suffix.lower() in shown]
    if not found:
        raise UserError(
            f"--images {path}: no image that browsers display; pass {', '.join(shown)} files"
        )
    examples: list[Path] = []
    unread: list[str] = []
    for image in found:
        try:
            read_image(image)
        except (UnreadableImage, OSError) as error:
            unread.append(escape_undecodable(f"{image} {error}"))
        else:
            examples.append(image)
        if len(examples) == MOST_EXAMPLES:
            break
    if not examples:
        raise UserError(f"--images {path}: no image can be read ({unread[0]}); pass other images")
    if unread:
        print(f"skipped {len(unread)} examples, e.g. {unread[0]}", file=sys.stderr)
    return examples
