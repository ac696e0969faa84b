package containerd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	ctd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
)

const (
	// localPrefix marks images that exist on machines only and in no registry.
	localPrefix = "localhost/"
	// pullStall is how long a pull may bring no byte before it is given up.
	pullStall = 2 * time.Minute
	// certsDir is where containerd's own tools look for registries' certificates,
	// mirrors and credentials (hosts.toml).
	certsDir = "/etc/containerd/certs.d"
)

// image returns the image unpacked, and pulls it when it is not here.
func (r *Runtime) image(ctx context.Context, ref string, report func(runtime.Progress)) (ctd.Image, error) {
	name, err := normalize(ref)
	if err != nil {
		return nil, err
	}
	// Sessions that need the same image at once wait for one pull.
	unlock, err := r.locks.lock(ctx, "image "+name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	img, err := r.client.GetImage(ctx, name)
	switch {
	case err == nil:
	case !errdefs.IsNotFound(err):
		return nil, fmt.Errorf("looking up image %s: %w", name, err)
	case strings.HasPrefix(name, localPrefix):
		return nil, fmt.Errorf("%w: %s is not on this machine, and names below %s are in no registry; `cloudcode image build` makes the default image, `cloudcode image import` brings in an archive",
			runtime.ErrImageNotFound, name, localPrefix)
	default:
		if img, err = r.pull(ctx, name, report); err != nil {
			return nil, err
		}
	}
	return img, r.unpack(ctx, img, report)
}

func (r *Runtime) unpack(ctx context.Context, img ctd.Image, report func(runtime.Progress)) error {
	ok, err := img.IsUnpacked(ctx, snapshotter)
	if err == nil && !ok {
		report(runtime.Progress{Phase: runtime.PhaseImage, Detail: "unpacking " + img.Name()})
		err = img.Unpack(ctx, snapshotter)
	}
	if err != nil {
		return fmt.Errorf("unpacking image %s: %w", img.Name(), err)
	}
	return nil
}

// normalize makes "debian:12" the name "docker.io/library/debian:12".
func normalize(ref string) (string, error) {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return "", fmt.Errorf("%w: image %q: %w", runtime.ErrInvalidSpec, ref, err)
	}
	return named.String(), nil
}

func (r *Runtime) pull(ctx context.Context, name string, report func(runtime.Progress)) (ctd.Image, error) {
	report(runtime.Progress{Phase: runtime.PhaseImage, Detail: "pulling " + name})
	resolver := docker.NewResolver(docker.ResolverOptions{
		Hosts: config.ConfigureHosts(ctx, config.HostOptions{HostDir: config.HostDirFromRoot(certsDir)}),
	})
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	p := &pullProgress{name: name, sizes: map[digest.Digest]int64{}}

	var wg sync.WaitGroup
	// Last, so after cancel: the watcher ends before this returns.
	defer wg.Wait()
	stop := make(chan struct{})
	defer close(stop)
	updates := make(chan runtime.Progress)
	wg.Go(func() { r.watchPull(ctx, p, updates, stop, cancel) })

	type result struct {
		img ctd.Image
		err error
	}
	done := make(chan result, 1)
	wg.Go(func() {
		img, err := r.client.Pull(ctx, name,
			ctd.WithResolver(resolver),
			ctd.WithPullUnpack,
			ctd.WithPullSnapshotter(snapshotter),
			ctd.WithImageHandler(images.HandlerFunc(p.seen)),
		)
		done <- result{img, err}
	})
	for {
		select {
		case u := <-updates:
			report(u) // from Ensure's own goroutine, as promised
		case res := <-done:
			if res.err != nil {
				return nil, pullError(ctx, name, res.err)
			}
			return res.img, nil
		}
	}
}

// pullError classes by what a person can do about it.
func pullError(ctx context.Context, name string, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		if errors.Is(cause, runtime.ErrImagePull) {
			return cause
		}
		return fmt.Errorf("pulling %s: %w", name, cause)
	}
	switch {
	case isNoSpace(err):
		return fmt.Errorf("%w: pulling %s: %w", runtime.ErrNoSpace, name, err)
	case errdefs.IsNotFound(err):
		return fmt.Errorf("%w: %s: the registry has no such image: %w", runtime.ErrImageNotFound, name, err)
	}
	return fmt.Errorf("%w: %s: %w", runtime.ErrImagePull, name, err)
}

// pullProgress knows the sizes of what a pull brings.
type pullProgress struct {
	name  string
	mu    sync.Mutex
	sizes map[digest.Digest]int64
}

func (p *pullProgress) seen(_ context.Context, d ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sizes[d.Digest] = d.Size
	return nil, nil
}

// watchPull reports bytes twice a second and ends a pull that stalls.
func (r *Runtime) watchPull(ctx context.Context, p *pullProgress, updates chan<- runtime.Progress, stop <-chan struct{}, cancel context.CancelCauseFunc) {
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	last, lastAt := int64(-1), time.Now()
	for {
		select {
		case <-tick.C:
		case <-stop:
			return
		}
		current, total := r.pulled(ctx, p)
		if current != last {
			last, lastAt = current, time.Now()
		} else if current < total && time.Since(lastAt) > pullStall {
			cancel(fmt.Errorf("%w: %s: no data for %s", runtime.ErrImagePull, p.name, pullStall))
		}
		u := runtime.Progress{Phase: runtime.PhaseImage, Detail: "pulling " + p.name, Current: current, Total: total}
		if total > 0 && current == total {
			u.Detail = "unpacking " + p.name
		}
		select {
		case updates <- u:
		case <-stop:
			return
		}
	}
}

func (r *Runtime) pulled(ctx context.Context, p *pullProgress) (current, total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	active := map[digest.Digest]int64{}
	if sts, err := r.client.ContentStore().ListStatuses(ctx, ""); err == nil {
		for _, st := range sts {
			// Refs look like "layer-sha256:<hex>".
			if _, d, ok := strings.Cut(st.Ref, "-"); ok {
				active[digest.Digest(d)] = st.Offset
			}
		}
	}
	for d, size := range p.sizes {
		total += size
		if off, ok := active[d]; ok {
			current += off
		} else if _, err := r.client.ContentStore().Info(ctx, d); err == nil {
			current += size
		}
	}
	return current, total
}

// ImportImage implements runtime.Runtime. The image is unpacked on return.
func (r *Runtime) ImportImage(ctx context.Context, archive io.Reader, name string, report func(runtime.Progress)) (runtime.Image, error) {
	if report == nil {
		report = func(runtime.Progress) {}
	}
	if name != "" {
		var err error
		if name, err = normalize(name); err != nil {
			return runtime.Image{}, err
		}
	}
	ctx, done, err := r.client.WithLease(r.ns(ctx))
	if err != nil {
		return runtime.Image{}, classify(err)
	}
	defer func() {
		cctx, cancel := afterwards(ctx)
		defer cancel()
		if err := done(cctx); err != nil {
			r.log.Warn("releasing a containerd lease", "err", err)
		}
	}()
	counted := &countingReader{r: archive, report: report}
	if f, ok := archive.(*os.File); ok {
		if fi, err := f.Stat(); err == nil && fi.Mode().IsRegular() {
			counted.total = fi.Size()
		}
	}
	var found []string
	imgs, err := r.client.Import(ctx, counted,
		ctd.WithImportPlatform(platforms.DefaultStrict()),
		ctd.WithImageRefTranslator(func(ref string) string {
			n, err := normalize(ref)
			// A bare tag is no name: OCI archives may hold only "latest".
			if err != nil || !strings.ContainsAny(ref, "/:@") {
				return ""
			}
			found = append(found, n)
			return n
		}),
		// Every manifest gets a passing name, so that one without any is found.
		ctd.WithDigestRef(func(d digest.Digest) string { return importPrefix + d.String() }),
	)
	if err != nil {
		if isNoSpace(err) {
			return runtime.Image{}, classify(err)
		}
		if errdefs.IsUnavailable(err) || ctx.Err() != nil {
			return runtime.Image{}, classify(err)
		}
		return runtime.Image{}, fmt.Errorf("%w: this is no OCI or Docker image archive for %s: %w", runtime.ErrInvalidSpec, platforms.DefaultString(), err)
	}
	return r.finishImport(ctx, imgs, name, report)
}

const importPrefix = "cloudcode-import@"

// finishImport gives the imported image its name, removes the passing ones and unpacks it.
func (r *Runtime) finishImport(ctx context.Context, imgs []images.Image, name string, report func(runtime.Progress)) (runtime.Image, error) {
	is := r.client.ImageService()
	var named, passing *images.Image
	for i := range imgs {
		if strings.HasPrefix(imgs[i].Name, importPrefix) {
			passing = &imgs[i]
			defer func() {
				cctx, cancel := afterwards(ctx)
				defer cancel()
				if err := is.Delete(cctx, imgs[i].Name); err != nil && !errdefs.IsNotFound(err) {
					r.log.Warn("removing a passing image name", "name", imgs[i].Name, "err", err)
				}
			}()
		} else if named == nil {
			named = &imgs[i]
		}
	}
	target := named
	if target == nil {
		target = passing
	}
	switch {
	case target == nil:
		return runtime.Image{}, fmt.Errorf("%w: the archive holds no image for %s", runtime.ErrInvalidSpec, platforms.DefaultString())
	case name == "" && named == nil:
		return runtime.Image{}, fmt.Errorf("%w: the archive does not name its image; give a name", runtime.ErrInvalidSpec)
	case name != "":
		img := images.Image{Name: name, Target: target.Target}
		if _, err := is.Create(ctx, img); errdefs.IsAlreadyExists(err) {
			if _, err := is.Update(ctx, img, "target"); err != nil {
				return runtime.Image{}, classify(err)
			}
		} else if err != nil {
			return runtime.Image{}, classify(err)
		}
	default:
		name = named.Name
	}
	img, err := r.client.GetImage(ctx, name)
	if err == nil {
		err = r.unpack(ctx, img, report)
	}
	if err != nil {
		return runtime.Image{}, classify(err)
	}
	return r.describe(ctx, img)
}

// Images implements runtime.Runtime.
func (r *Runtime) Images(ctx context.Context) ([]runtime.Image, error) {
	ctx = r.ns(ctx)
	list, err := r.client.ListImages(ctx)
	if err != nil {
		return nil, classify(fmt.Errorf("listing images: %w", err))
	}
	var out []runtime.Image
	for _, img := range list {
		if strings.HasPrefix(img.Name(), importPrefix) {
			continue
		}
		d, err := r.describe(ctx, img)
		if errdefs.IsNotFound(err) {
			continue // a pull or import is under way
		} else if err != nil {
			return nil, classify(err)
		}
		out = append(out, d)
	}
	return out, nil
}

func (r *Runtime) describe(ctx context.Context, img ctd.Image) (runtime.Image, error) {
	size, err := img.Size(ctx)
	if err != nil {
		return runtime.Image{}, err
	}
	return runtime.Image{
		Name: img.Name(), Digest: img.Target().Digest.String(), SizeBytes: size, CreatedAt: img.Metadata().UpdatedAt,
	}, nil
}

// countingReader reports what was read, at most five times a second.
type countingReader struct {
	r      io.Reader
	report func(runtime.Progress)
	n      int64
	total  int64
	last   time.Time
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if time.Since(c.last) > 200*time.Millisecond || err != nil {
		c.last = time.Now()
		c.report(runtime.Progress{Phase: runtime.PhaseImage, Detail: "reading the archive", Current: c.n, Total: c.total})
	}
	return n, err
}
