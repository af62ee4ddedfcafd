"""``python -m secateur``, which is also what ``accelerate launch -m secateur`` runs."""

from secateur.cli import main

if __name__ == "__main__":
    main()
