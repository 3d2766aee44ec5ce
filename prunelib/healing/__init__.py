"""How is a pruned model trained back?"""
