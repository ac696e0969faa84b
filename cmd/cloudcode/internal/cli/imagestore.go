package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	ctd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime/containerd"
)

// imageStore is the part of runtime.Runtime that these commands need. It is not
// the Runtime itself: that one belongs to the node daemon, and a second one
// would clean up behind the first.
type imageStore interface {
	ImportImage(ctx context.Context, archive io.Reader, name string, report func(runtime.Progress)) (runtime.Image, error)
	Images(ctx context.Context) ([]runtime.Image, error)
	Close() error
}

const (
	imageSnapshotter = "overlayfs"
	passingPrefix    = "cloudcode-import@" // names for the time of an import; the node daemon hides them too
)

type ctdImages struct{ client *ctd.Client }

// openImages connects to containerd's socket.
func openImages(ctx context.Context, address string) (imageStore, error) {
	c, err := ctd.New(address, ctd.WithDefaultNamespace(containerd.DefaultNamespace), ctd.WithTimeout(5*time.Second))
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", runtime.ErrUnavailable, address, err)
	}
	vctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if _, err := c.Version(vctx); err != nil {
		_ = c.Close()
		return nil, fmt.Errorf("%w: containerd at %s does not answer: %w", runtime.ErrUnavailable, address, err)
	}
	return ctdImages{c}, nil
}

func (s ctdImages) Close() error { return s.client.Close() }

func (s ctdImages) Images(ctx context.Context) ([]runtime.Image, error) {
	list, err := s.client.ListImages(ctx)
	if err != nil {
		return nil, err
	}
	var out []runtime.Image
	for _, img := range list {
		if strings.HasPrefix(img.Name(), passingPrefix) {
			continue
		}
		d, err := describeImage(ctx, img)
		if errdefs.IsNotFound(err) {
			continue // not whole: a pull or import is under way
		} else if err != nil {
			return nil, err
		}
		out = append(out, d)
	}
	return out, nil
}

func describeImage(ctx context.Context, img ctd.Image) (runtime.Image, error) {
	size, err := img.Size(ctx)
	if err != nil {
		return runtime.Image{}, fmt.Errorf("image %s: %w", img.Name(), err)
	}
	return runtime.Image{Name: img.Name(), Digest: img.Target().Digest.String(), SizeBytes: size, CreatedAt: img.Metadata().UpdatedAt}, nil
}

func normalizeRef(ref string) (string, error) {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return "", fmt.Errorf("%w: image name %q: %w", runtime.ErrInvalidSpec, ref, err)
	}
	return named.String(), nil
}

func (s ctdImages) ImportImage(ctx context.Context, archive io.Reader, name string, report func(runtime.Progress)) (_ runtime.Image, err error) {
	if name != "" {
		if name, err = normalizeRef(name); err != nil {
			return runtime.Image{}, err
		}
	}
	ctx, done, err := s.client.WithLease(namespaces.WithNamespace(ctx, containerd.DefaultNamespace))
	if err != nil {
		return runtime.Image{}, err
	}
	var passing []string
	defer func() {
		// Also when ctx has ended: a lease that stays keeps blobs for a day.
		cctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
		defer cancel()
		for _, n := range passing {
			if derr := s.client.ImageService().Delete(cctx, n); !errdefs.IsNotFound(derr) {
				err = errors.Join(err, derr)
			}
		}
		err = errors.Join(err, done(cctx))
	}()
	found, err := s.client.Import(ctx, archive,
		ctd.WithImportPlatform(platforms.DefaultStrict()),
		ctd.WithImageRefTranslator(func(ref string) string {
			// A bare tag is no name: OCI archives may hold only "latest".
			if n, err := normalizeRef(ref); err == nil && strings.ContainsAny(ref, "/:@") {
				return n
			}
			return ""
		}),
		// Every manifest gets a passing name, so that one without any is found.
		ctd.WithDigestRef(func(d digest.Digest) string { return passingPrefix + d.String() }),
	)
	if err != nil {
		return runtime.Image{}, err
	}
	var target *images.Image
	for i, img := range found {
		if strings.HasPrefix(img.Name, passingPrefix) {
			passing = append(passing, img.Name)
		}
		if target == nil || strings.HasPrefix(target.Name, passingPrefix) {
			target = &found[i]
		}
	}
	switch {
	case target == nil:
		return runtime.Image{}, fmt.Errorf("%w: the archive holds no image for %s", runtime.ErrInvalidSpec, platforms.DefaultString())
	case name == "" && strings.HasPrefix(target.Name, passingPrefix):
		return runtime.Image{}, fmt.Errorf("%w: the archive does not name its image; give one with --name", runtime.ErrInvalidSpec)
	case name == "":
		name = target.Name
	default:
		img := images.Image{Name: name, Target: target.Target}
		if _, err = s.client.ImageService().Create(ctx, img); errdefs.IsAlreadyExists(err) {
			_, err = s.client.ImageService().Update(ctx, img, "target")
		}
		if err != nil {
			return runtime.Image{}, err
		}
	}
	img, err := s.client.GetImage(ctx, name)
	if err != nil {
		return runtime.Image{}, err
	}
	if ok, err := img.IsUnpacked(ctx, imageSnapshotter); err != nil {
		return runtime.Image{}, err
	} else if !ok {
		report(runtime.Progress{Phase: runtime.PhaseImage, Detail: "unpacking " + name})
		if err := img.Unpack(ctx, imageSnapshotter); err != nil {
			return runtime.Image{}, err
		}
	}
	return describeImage(ctx, img)
}
