"""`python -m fitout`, which is what launchers of ranks start: torchrun -m fitout run recipe.yaml."""

from .cli.app import main

if __name__ == "__main__":
    main()
