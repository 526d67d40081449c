"""`python -m dualtrace.cli`: the command line where no script is installed, and for processes we start ourselves."""

from dualtrace.cli import main

if __name__ == "__main__":
    main(prog_name="dualtrace")
