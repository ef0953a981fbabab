from raglan.cli import main

main()
