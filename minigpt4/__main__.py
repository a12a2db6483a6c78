"""`python -m minigpt4`, which torchrun needs."""

from minigpt4.cli import main

if __name__ == "__main__":
    main()
