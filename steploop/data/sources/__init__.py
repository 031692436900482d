"""Small datasets for recipes: CIFAR-10, digits, image folders, text, and images made by code."""
