"""Ray job: `motip convert` on a cluster; --help lists the options."""

from motip.cli.main import run_job

if __name__ == "__main__":
    run_job("convert")
