from llamapro.cli import main

main()
