"""`fitout VERB`. Only typer is imported here; a verb imports what it needs when it is called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="fitout",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune a pretrained language model with labelled data, end to end, with evidence at every step.",
)
data_app = typer.Typer(no_args_is_help=True, help="Check, prepare and look at data.")
app.add_typer(data_app, name="data")

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe (YAML)")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, runs/NAME")]
Changes = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a key of the recipe")]
Out = Annotated[Path | None, typer.Option(help="the run directory (default: runs/NAME)")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of drawing")]


@app.command()
def demo(out: Out = None, json: Json = False) -> None:
    """The whole chain on the embedded model and data: offline, on a CPU, in under two minutes."""
    from .. import verbs
    from ..config import load
    from ..demo import RECIPE
    from .screen import open_screen

    with open_screen(json) as screen:
        directory = verbs.run(load(RECIPE), out=out, screen=screen.verbs)
        screen.show_run(directory)


@app.command()
def init(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="a data file or folder")],
    model: Annotated[str, typer.Option(help="a folder, a hub id, or embedded:shell")] = "embedded:shell",
    method: Annotated[str, typer.Option(help="lora or full")] = "lora",
    to: Annotated[Path, typer.Option(help="where to write the recipe")] = Path("recipe.yaml"),
) -> None:
    """Writes a commented recipe for a model and a data file."""
    from .draft import write_recipe
    from .screen import open_screen

    with open_screen() as screen:
        write_recipe(data, model, method, to)
        screen.say(f"wrote {to}; next: fitout run {to}")


@app.command()
def run(recipe: RecipeFile, changes: Changes = None, out: Out = None, json: Json = False) -> None:
    """Prepares, trains, evaluates and merges; goes on where it stopped."""
    from .. import verbs
    from ..config import load
    from .screen import open_screen

    with open_screen(json) as screen:
        directory = verbs.run(load(recipe, changes), out=out, screen=screen.verbs)
        screen.show_run(directory)


@app.command()
def plan(
    recipe: RecipeFile,
    changes: Changes = None,
    out: Out = None,
    device: Annotated[
        str | None, typer.Option(help="cpu-24g, rtx3090-24g, h100-80g, ... (default: this machine)")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="how many such devices")] = 1,
    length: Annotated[int | None, typer.Option(min=2, help="tokens a sample on average, instead of the data")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="with --length: how many training samples")] = None,
    json: Json = False,
) -> None:
    """Memory and time of every method before the run: what fits, which term is too big, what to turn."""
    from .. import verbs
    from ..config import load
    from .screen import open_screen

    with open_screen(json) as screen:
        screen.show_plan(
            verbs.plan(
                load(recipe, changes), device=device, devices=devices, length=length, samples=samples, out=out,
                screen=screen.verbs,
            )
        )  # fmt: skip


@app.command()
def train(
    recipe: RecipeFile,
    changes: Changes = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a run that exists")] = False,
    json: Json = False,
) -> None:
    """One training run into runs/NAME."""
    from .. import verbs
    from ..config import load
    from .screen import open_screen

    with open_screen(json) as screen:
        directory = verbs.train(load(recipe, changes), out=out, resume=resume, screen=screen.verbs)
        screen.show_run(directory)


@app.command()
def evaluate(
    run: RunFolder,
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="evaluate.* keys")] = None,
    json: Json = False,
) -> None:
    """Base against tuned on the held-out test part: scores with intervals, and what was forgotten."""
    from .. import verbs
    from ..config import load
    from ..rundir import RunDir
    from .screen import open_screen

    with open_screen(json) as screen:
        directory = RunDir(run)
        verbs.recipe_of(directory)
        verbs.evaluate(directory, changes=load(directory.recipe, changes), screen=screen.verbs)
        screen.show_run(directory)


@app.command()
def merge(run: RunFolder, json: Json = False) -> None:
    """Folds a run's adapter into its base and checks that the logits stay the same."""
    from .. import verbs
    from ..rundir import RunDir
    from .screen import open_screen

    with open_screen(json) as screen:
        verbs.merge(RunDir(run), screen=screen.verbs)
        screen.show_run(RunDir(run))


Model = Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="a run, a model folder, a hub id, embedded:shell")]
Adapter = Annotated[str | None, typer.Option(help="an adapter folder over the model")]


@app.command()
def chat(
    model: Model,
    adapter: Adapter = None,
    system: Annotated[str | None, typer.Option(help="a system prompt")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
) -> None:
    """Talk with a model in the terminal."""
    from .. import verbs
    from .screen import open_screen
    from .talk import talk

    with open_screen() as screen:
        engine = verbs.open_engine(model, adapter=adapter)
        code = talk(
            engine, system=system, max_new_tokens=max_new_tokens, temperature=temperature, console=screen.console
        )
    raise typer.Exit(code)


@app.command()
def serve(
    model: Model,
    adapter: Adapter = None,
    host: Annotated[
        str, typer.Option(help="loopback unless you say otherwise; then a token is required")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    token: Annotated[str | None, typer.Option(envvar="FITOUT_TOKEN", help="what clients must send as Bearer")] = None,
    name: Annotated[str | None, typer.Option(help="the model name clients use")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="the longest answer a client may ask for")] = 1024,
) -> None:
    """An OpenAI-compatible server."""
    from .. import verbs
    from ..serve import ServeSettings, check_settings

    settings = ServeSettings(host=host, port=port, token=token, max_new_tokens=max_new_tokens)
    check_settings(settings)
    from ..serve.app import serve as start

    start(verbs.open_engine(model, adapter=adapter), settings, model_name=name or Path(model).name)


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option(help="a model to look at: does packing keep documents apart?")] = None,
    json: Json = False,
) -> None:
    """What this machine has, what will be used, what is missing and how to get it."""
    from .doctor import examine
    from .screen import open_screen

    with open_screen(json) as screen:
        screen.show_facts(examine(model))


@data_app.command("check")
def data_check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="data files or folders")],
    format: Annotated[str | None, typer.Option(help="the row format (default: detected)")] = None,
    json: Json = False,
) -> None:
    """Reads only: the format found and findings by severity. Exit code 1 when there are errors."""
    from .inspect import check_files
    from .screen import open_screen

    with open_screen(json) as screen:
        errors = check_files(files, format, screen)
    raise typer.Exit(1 if errors else 0)


@data_app.command("prepare")
def data_prepare(recipe: RecipeFile, changes: Changes = None, out: Out = None, json: Json = False) -> None:
    """The data stages alone: report, quarantine, prepared parts."""
    from .. import verbs
    from ..config import load
    from .screen import open_screen

    with open_screen(json) as screen:
        directory = verbs.prepare(load(recipe, changes), out=out, screen=screen.verbs)
        screen.show_data(directory)


@data_app.command("xray")
def data_xray(
    recipe: RecipeFile,
    changes: Changes = None,
    out: Out = None,
    row: Annotated[int | None, typer.Option(min=1, help="only this row of the training part")] = None,
    rows: Annotated[int, typer.Option(min=1, help="how many rows to show")] = 3,
    html: Annotated[Path | None, typer.Option(help="write the view as a page")] = None,
) -> None:
    """The tokens as they are trained: which are supervised, which are context, which were cut."""
    from .. import verbs
    from ..config import load
    from .inspect import show_xray
    from .screen import open_screen

    with open_screen() as screen:
        show_xray(verbs.xray(load(recipe, changes), out=out, screen=screen.verbs), row, rows, html, screen)


def main() -> None:
    """The entry point: a user's mistake ends in a short message and its exit code, never in a traceback."""
    from ..errors import FitoutError

    try:
        app(standalone_mode=True)
    except FitoutError as error:
        _complain(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(3)


def _complain(error: Any) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    first, *rest = error.lines()
    console.print(Text.assemble(("error ", "bold red"), first), soft_wrap=True)
    for line in rest:
        console.print(Text("      " + line), soft_wrap=True)


if __name__ == "__main__":
    main()
