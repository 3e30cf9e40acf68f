"""`python -m squeezevit`, as torchrun and accelerate launch want it."""

from squeezevit.cli import main

if __name__ == "__main__":
    main()
