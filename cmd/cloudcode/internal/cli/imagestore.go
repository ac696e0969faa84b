package cli

import (
	"context"
	"io"

	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime/containerd"
)

// imageStore is the part of runtime.Runtime that these commands need.
type imageStore interface {
	ImportImage(ctx context.Context, archive io.Reader, name string, report func(runtime.Progress)) (runtime.Image, error)
	Images(ctx context.Context) ([]runtime.Image, error)
	Close() error
}

func openImages(ctx context.Context, address string) (imageStore, error) {
	return containerd.OpenImages(ctx, address)
}
