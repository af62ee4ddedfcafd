"""``python -m secateur``, which is also what a launcher of several processes runs."""

from secateur.cli import main

if __name__ == "__main__":
    main()
