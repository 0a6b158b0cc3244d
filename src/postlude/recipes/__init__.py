"""Recipes: one short file each. A recipe says which tokens get which stream and which objective consumes them."""
