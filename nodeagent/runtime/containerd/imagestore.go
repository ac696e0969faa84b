package containerd

import (
	"context"
	"fmt"
	"io"
	"log/slog"

	ctd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/log"

	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
)

// ImageStore is containerd's images alone. Unlike a Runtime it touches neither
// containers nor the network, so it may be used beside a node daemon.
type ImageStore struct{ r *Runtime }

// OpenImages connects to containerd's socket. Returns runtime.ErrUnavailable when
// containerd does not answer.
func OpenImages(ctx context.Context, address string) (*ImageStore, error) {
	_ = log.SetLevel("error") // containerd's libraries print at level info by themselves
	r := &Runtime{cfg: Config{Address: address, Namespace: DefaultNamespace}, log: slog.New(slog.DiscardHandler)}
	var err error
	if r.client, err = ctd.New(address, ctd.WithDefaultNamespace(DefaultNamespace), ctd.WithTimeout(callTimeout)); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", runtime.ErrUnavailable, address, err)
	}
	vctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if _, err := r.client.Version(vctx); err != nil {
		_ = r.client.Close()
		return nil, fmt.Errorf("%w: containerd at %s does not answer: %w", runtime.ErrUnavailable, address, err)
	}
	return &ImageStore{r}, nil
}

// ImportImage is runtime.Runtime's.
func (s *ImageStore) ImportImage(ctx context.Context, archive io.Reader, name string, report func(runtime.Progress)) (runtime.Image, error) {
	return s.r.ImportImage(ctx, archive, name, report)
}

// Images is runtime.Runtime's.
func (s *ImageStore) Images(ctx context.Context) ([]runtime.Image, error) { return s.r.Images(ctx) }

// Close lets go of containerd.
func (s *ImageStore) Close() error { return s.r.Close() }
