"""What is a layer worth?"""
