"""How fast packages are: tokens a second, memory and what a step's time goes to, by length."""
