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
ProfileFlag = Annotated[bool, typer.Option("--profile", help="time three steps part by part, and write a trace")]
Processes = Annotated[int, typer.Option(min=1, help="ranks on this machine; one for each GPU")]
Nodes = Annotated[int, typer.Option(min=1, help="machines that run this same command")]
Rendezvous = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="with --nodes: the first machine, where all meet")
]
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
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="[DATA]", help="a data file, folder or hub id; without it, on a terminal, you are asked"
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="a folder, a hub id, or embedded:shell (default: embedded:shell)")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="full, lora, dora, qlora, adapter or sparse (default: the planner chooses)")
    ] = None,
    machine: Annotated[
        str | None, typer.Option(help="where it will run: cpu-24g, rtx3090-24g, h200, ... (default: this machine)")
    ] = None,
    aim: Annotated[
        str | None, typer.Option(help="form, chat, knowledge, labels or text (default: by the look of the data)")
    ] = None,
    peer: Annotated[
        Path | None, typer.Option("--from", metavar="YAML", help="carry over a LLaMA-Factory or Axolotl configuration")
    ] = None,
    to: Annotated[Path, typer.Option(help="where to write the recipe")] = Path("recipe.yaml"),
    json: Json = False,
) -> None:
    """Writes a recipe for your data and model, with the reason for each key; asks when called without DATA."""
    from .ask import ask, on_a_terminal
    from .draft import look, refuse, write_recipe
    from .screen import open_screen

    refuse(to)
    if peer is not None:
        from .peers import write_carried

        with open_screen(json) as screen:
            screen.show_carried(write_carried(peer, to), to)
        return
    asked = data is None and not json and on_a_terminal()
    wishes = ask(model, method, machine, aim) if asked else look(data, model, method, machine, aim)
    with open_screen(json) as screen:
        screen.show_draft(write_recipe(wishes, to), to)


@app.command()
def run(
    recipe: RecipeFile,
    changes: Changes = None,
    out: Out = None,
    processes: Processes = 1,
    nodes: Nodes = 1,
    rendezvous: Rendezvous = None,
    profile: ProfileFlag = False,
    json: Json = False,
) -> None:
    """Prepares, trains, evaluates and merges; goes on where it stopped."""
    flags = {"--profile": profile, "--json": json}
    _as_ranks("run", recipe, changes, out, processes, nodes, rendezvous, flags)
    from .. import verbs
    from ..config import load
    from .screen import open_screen

    with open_screen(json) as screen:
        directory = verbs.run(load(recipe, changes), out=out, profile=profile, screen=screen.verbs)
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
    processes: Processes = 1,
    nodes: Nodes = 1,
    rendezvous: Rendezvous = None,
    profile: ProfileFlag = False,
    json: Json = False,
) -> None:
    """One training run into runs/NAME."""
    flags = {"--resume": resume, "--profile": profile, "--json": json}
    _as_ranks("train", recipe, changes, out, processes, nodes, rendezvous, flags)
    from .. import verbs
    from ..config import load
    from .screen import open_screen

    with open_screen(json) as screen:
        directory = verbs.train(load(recipe, changes), out=out, resume=resume, profile=profile, screen=screen.verbs)
        screen.show_run(directory)


def _as_ranks(
    verb: str,
    recipe: Path,
    changes: list[str] | None,
    out: Path | None,
    processes: int,
    nodes: int,
    rendezvous: str | None,
    flags: dict[str, bool],
) -> None:
    """Where several processes are asked for: the same command in each; ends this one with their exit code. A recipe's
    mistakes are told once."""
    if processes == nodes == 1 and not rendezvous:
        return
    from ..config import load
    from ..rundir import RunDir
    from .launch import launch

    name = load(recipe, changes).name
    arguments = [verb, str(recipe), *(f"--set={change}" for change in changes or [])]
    arguments += [f"--out={out}"] if out else []
    arguments += [flag for flag, on in flags.items() if on]
    directory = RunDir(out or Path("runs") / name)
    raise typer.Exit(launch(arguments, directory, processes=processes, nodes=nodes, rendezvous=rendezvous))


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
        verbs.evaluate(directory, changes=load(directory.recipe, changes, anchor=False), screen=screen.verbs)
        screen.show_run(directory)


@app.command()
def compare(
    recipe: RecipeFile,
    methods: Annotated[str | None, typer.Option(metavar="KIND,KIND,...", help="(default: every method)")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="trainings of each method")] = 3,
    budget: Annotated[
        str | None,
        typer.Option(metavar="steps=N|tokens=N|minutes=N", help="of each training (default: the recipe's length)"),
    ] = None,
    lrs: Annotated[
        list[str] | None,
        typer.Option(metavar="[KIND=]RATE,RATE,...", help="learning rates to choose from (default: around the usual)"),
    ] = None,
    changes: Changes = None,
    out: Annotated[Path | None, typer.Option(help="where to (default: runs/NAME-compare)")] = None,
    json: Json = False,
) -> None:
    """Methods on your data under the same budget: a ranking of what was shown; goes on where it stopped."""
    from .. import verbs
    from ..config import load
    from .screen import open_screen

    kinds = [] if methods is None else [kind.strip() for kind in methods.split(",") if kind.strip()] or [methods]
    with open_screen(json) as screen:
        result = verbs.compare(
            load(recipe, changes), kinds, seeds=seeds, budget=budget, lrs=lrs or [], out=out, screen=screen.verbs
        )
        screen.show_comparison(result)


@app.command()
def merge(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="a run; or several runs or adapter folders, to combine")
    ],
    how: Annotated[str, typer.Option(help="several: linear, ties, dare_linear or dare_ties")] = "linear",
    weights: Annotated[
        str | None, typer.Option(metavar="W,W,...", help="several: a weight for each (default: equal shares)")
    ] = None,
    density: Annotated[float, typer.Option(help="ties, dare: the share of entries that is kept")] = 0.5,
    to: Annotated[Path | None, typer.Option(metavar="DIR", help="several: where adapter/ and merged/ go")] = None,
    json: Json = False,
) -> None:
    """Folds a run's adapter into its base and checks that the logits stay the same; or several adapters, as one."""
    from .. import verbs
    from ..errors import RequestError
    from ..rundir import RunDir
    from .screen import open_screen

    with open_screen(json) as screen:
        if len(runs) == 1 and to is None:
            verbs.merge(RunDir(runs[0]), screen=screen.verbs)
            screen.show_run(RunDir(runs[0]))
            return
        if to is None:
            raise RequestError("several adapters make a new one", hint="Say where it goes: --to DIR.")
        shares = _numbers(weights) if weights else []
        verbs.combine(runs, to, how=how, weights=shares, density=density, screen=screen.verbs)
        screen.show_facts({"adapter": str(to / "adapter"), "merged model": str(to / "merged")})


def _numbers(text: str) -> list[float]:
    from ..errors import RequestError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"{text!r} is no list of numbers", where="--weights", hint="Say 0.7,0.3.") from None


Model = Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="a run, a model folder, a hub id, embedded:shell")]
Adapter = Annotated[str | None, typer.Option(help="an adapter folder over the model")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="run the model's own code")]


@app.command()
def export(
    model: Model,
    to: Annotated[
        Path | None, typer.Option(metavar="DIR", help="a new folder; without it, only says which engine can load it")
    ] = None,
    engine: Annotated[str, typer.Option("--for", help="transformers, vllm, ollama or llamacpp")] = "transformers",
    unmerged: Annotated[bool, typer.Option("--unmerged", help="vllm: the adapter apart, over its base")] = False,
    stored_as: Annotated[
        str | None, typer.Option(help="GGUF: f32, f16, bf16 or q8_0 (default: as the model is stored)")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Writes what an engine needs to load it, checked before and after."""
    from .. import verbs
    from .screen import open_screen

    with open_screen(json) as screen:
        if to is None:
            screen.show_engines(verbs.can_load(model, trust_remote_code=trust_remote_code))
            return
        screen.show_export(
            verbs.export(
                model,
                engine=engine,
                to=to,
                unmerged=unmerged,
                stored_as=stored_as,
                trust_remote_code=trust_remote_code,
                screen=screen.verbs,
            )
        )


@app.command()
def chat(
    model: Model,
    adapter: Adapter = None,
    system: Annotated[str | None, typer.Option(help="a system prompt")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk with a model in the terminal."""
    from .. import verbs
    from .screen import open_screen
    from .talk import talk

    with open_screen() as screen:
        engine = verbs.open_engine(model, adapter=adapter, trust_remote_code=trust_remote_code)
        _tell_how(engine)
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
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8000,
    token: Annotated[str | None, typer.Option(envvar="FITOUT_TOKEN", help="what clients must send as Bearer")] = None,
    name: Annotated[str | None, typer.Option(help="the model name clients use")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="the longest answer a client may ask for")] = 1024,
    max_concurrent: Annotated[int, typer.Option(min=1, help="requests at once; one beyond is refused (429)")] = 16,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """An OpenAI-compatible server."""
    from .. import verbs
    from ..serve import ServeSettings, check_settings

    settings = ServeSettings(
        host=host, port=port, token=token, max_new_tokens=max_new_tokens, max_concurrent=max_concurrent
    )
    check_settings(settings)
    from ..serve.app import serve as start

    engine = verbs.open_engine(model, adapter=adapter, trust_remote_code=trust_remote_code)
    _tell_how(engine)
    start(engine, settings, model_name=name or Path(model).resolve().name)


def _tell_how(engine: Any) -> None:
    """Says on standard error when the base is computed with in other numbers than it is stored in, and when answers
    take longer than they might."""
    held = getattr(engine.model, "fitout_held", None)
    if held:
        typer.echo(f"the base is held {held}, as it was trained over", err=True)
    if engine.slow:
        typer.echo(engine.slow, err=True)


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
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="data files, folders, hub ids or recipes")],
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


Tool = Annotated[str, typer.Argument(metavar="TOOL", help="label-studio or doccano")]
ServerUrl = Annotated[
    str | None, typer.Option(help="the server (default: LABEL_STUDIO_URL or DOCCANO_URL, else its usual port here)")
]


@data_app.command("push")
def data_push(
    tool: Tool,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="questions, or samples whose answers are to be corrected")
    ],
    title: Annotated[str | None, typer.Option(help="the project's title (default: the file's name)")] = None,
    url: ServerUrl = None,
    format: Annotated[str | None, typer.Option(help="the row format (default: detected)")] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="JSON or YAML of task labels, {task: [sub-task, ...]} (default: those of the data)"),
    ] = None,
    kind: Annotated[str, typer.Option(help="doccano: answers or labels")] = "answers",
    annotators: Annotated[int, typer.Option(min=1, help="how many are to answer each task")] = 1,
    draft: Annotated[
        str | None, typer.Option(metavar="RUN_MODEL_OR_URL", help="who answers first, to be corrected")
    ] = None,
    draft_model: Annotated[str | None, typer.Option(help="the model's name at the drafting server")] = None,
    json: Json = False,
) -> None:
    """Makes a project in an annotation tool and sends it tasks; credentials come from the environment."""
    from .annotate import push
    from .screen import open_screen

    with open_screen(json) as screen:
        push(tool, file, title, url, format, labels, kind, annotators, draft, draft_model, screen)


@data_app.command("pull")
def data_pull(
    tool: Tool,
    project: Annotated[int | None, typer.Argument(metavar="[PROJECT]", help="the project's number")] = None,
    to: Annotated[Path, typer.Option(metavar="DIR", help="where answers and agreement go")] = Path("annotated"),
    rule: Annotated[str, typer.Option(help="of several answers: majority, best-rated or reviewer")] = "majority",
    url: ServerUrl = None,
    file: Annotated[Path | None, typer.Option(help="a Label Studio JSON export instead of a server")] = None,
    json: Json = False,
) -> None:
    """Brings answers back: one for each task by a rule, with annotator, time and rating; and how far people agree."""
    from .annotate import pull
    from .screen import open_screen

    with open_screen(json) as screen:
        pull(tool, project, to, rule, url, file, screen)


@data_app.command("repair")
def data_repair(
    recipe: RecipeFile,
    accept: Annotated[
        list[str] | None,
        typer.Option(metavar="RULE", help="accept the suggested repairs of this rule (again for more), or of `all`"),
    ] = None,
    changes: Changes = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Suggests repairs of quarantined rows and lets accepted ones in again; edit repairs.jsonl to write your own."""
    from .. import verbs
    from ..config import load
    from .inspect import show_repairs
    from .screen import open_screen

    with open_screen(json) as screen:
        show_repairs(verbs.repair(load(recipe, changes), accept=accept or [], out=out, screen=screen.verbs), screen)


@data_app.command("export")
def data_export(
    recipe: RecipeFile,
    form: Annotated[str, typer.Option("--format", help="openai, alpaca, sharegpt, hf or label-studio")] = "openai",
    to: Annotated[Path | None, typer.Option(metavar="DIR", help="a new folder (default: NAME-FORMAT)")] = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="openai: price of a million training tokens, for the cost of an epoch")
    ] = None,
    longest: Annotated[int, typer.Option(min=1, help="openai: tokens a line may have")] = 65_536,
    changes: Changes = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Writes the prepared data in the form of another tool, checked by its rules; what does not fit is counted."""
    from .. import verbs
    from ..config import load
    from .annotate import draw_written
    from .screen import open_screen

    with open_screen(json) as screen:
        draw_written(
            verbs.export_data(
                load(recipe, changes), form, to, price=price, longest=longest, out=out, screen=screen.verbs
            ),
            screen,
        )


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
    import os

    from ..errors import FitoutError

    if "LOCAL_RANK" in os.environ:  # the deepspeed launcher says the local rank in an argument too
        sys.argv[1:] = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    try:
        app(standalone_mode=True)
    except FitoutError as error:
        _complain(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(3)


def _complain(error: Any) -> None:
    import json
    import os

    from rich.console import Console
    from rich.text import Text

    from ..errors import Stopped

    console = Console(stderr=True, highlight=False)
    first, *rest = error.lines()
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        if isinstance(error, Stopped):  # the first rank says it
            return
        first = f"rank {rank}: {first}"
    elif "--json" in sys.argv:
        told = {"error": error.message, "where": error.where, "harm": error.harm, "hint": error.hint}
        print(json.dumps({**told, "exit_code": error.exit_code}, ensure_ascii=False))
    console.print(Text.assemble(("error ", "bold red"), first), soft_wrap=True)
    for line in rest:
        console.print(Text("      " + line), soft_wrap=True)


if __name__ == "__main__":
    main()
