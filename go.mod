module github.com/cloudcode-dev/cloudcode

go 1.26.0
