"""`python -m expe_edge`, the same as `expe-edge`."""

from expe_edge.cli.main import main

if __name__ == "__main__":
    main(prog_name="expe-edge")
