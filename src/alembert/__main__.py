"""`python -m alembert`, and what `torchrun -m alembert` starts in every process."""

from alembert.cli import main

if __name__ == "__main__":
    main()
