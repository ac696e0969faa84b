package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

var (
	// ErrMissingTool: a program that the build runs is not installed; the text says how to get it.
	ErrMissingTool = errors.New("missing tool")
	// ErrNotRoot: mmdebstrap needs root to give files their owners and to run packages' scripts.
	ErrNotRoot = errors.New("building the session image needs root")
	// ErrPlatform: this machine is of a kind that images cannot be built on.
	ErrPlatform = errors.New("session images are built on linux/amd64 only")
)

// BuildOptions is what a build can be told. The zero value builds the default image.
type BuildOptions struct {
	// CacheDir holds finished layers and archives; about 500 MB. Default: cloudcode/image in
	// the user's cache folder.
	CacheDir string
	// Ref is the name that the archive gives the image. Default: DefaultRef.
	Ref string
	// Mirrors is where Debian's packages come from, as mmdebstrap takes it: addresses, "deb …"
	// lines or files with such lines. They become the image's apt sources. Default: mmdebstrap's
	// own, with security updates.
	Mirrors []string
	// Cloudflared is the program itself, a folder that holds it, or an http(s) address to
	// download it from. Without it the image has none, and Result.LeftOut says so.
	Cloudflared string
	// NoCache builds every layer again, for newer Debian packages.
	NoCache bool
	// Progress is told what happens, one call at a time. It may be nil.
	Progress func(Progress)
}

// Phase is a part of a build.
type Phase string

// The phases. Base and tools run at the same time.
const (
	PhaseCheck       Phase = "check"
	PhaseBase        Phase = "base"        // Debian: about half a minute
	PhaseTools       Phase = "tools"       // Node.js, npm, OpenCode
	PhaseCloudflared Phase = "cloudflared" // if asked for
	PhaseFiles       Phase = "files"       // preset and entrypoint
	PhaseArchive     Phase = "archive"
)

// Progress is one line about what a build does.
type Progress struct {
	Phase   Phase
	Line    string
	Elapsed time.Duration // since the build started
	Done    bool          // the phase has ended well
}

// Result is a finished image.
type Result struct {
	Ref     string        // the image's name after import
	Digest  string        // of its manifest, "sha256:…"; containerd shows the same
	Path    string        // the OCI archive
	Size    int64         // of the archive, bytes
	Cached  bool          // nothing had to be built
	Took    time.Duration // of the whole call
	LeftOut []string      // what the image lacks, each with the reason and what to do
	Layers  []LayerInfo
}

// LayerInfo says what a layer costs.
type LayerInfo struct {
	Name     Phase
	Digest   string
	Size     int64 // compressed, bytes
	Unpacked int64 // bytes
	Cached   bool
	Took     time.Duration // to build it; 0 if cached
}

// Build makes the session image, or finds it in the cache. Builds that share a cache wait for one
// another. Errors wrap ErrMissingTool, ErrNotRoot or ErrPlatform where those are the reason;
// a cancelled ctx ends the programs that were started.
func Build(ctx context.Context, o BuildOptions) (Result, error) {
	start := time.Now()
	b := &builder{o: o, start: start}
	if o.Ref == "" {
		b.o.Ref = DefaultRef
	}
	if b.o.CacheDir == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			return Result{}, fmt.Errorf("no folder for the image cache, give one: %w", err)
		}
		b.o.CacheDir = filepath.Join(dir, "cloudcode", "image")
	}
	if err := os.MkdirAll(b.o.CacheDir, 0o755); err != nil {
		return Result{}, fmt.Errorf("image cache: %w", err)
	}
	c, err := openCache(ctx, b.o.CacheDir, func() {
		b.say(PhaseCheck, "waiting for another build in "+b.o.CacheDir)
	})
	if err != nil {
		return Result{}, fmt.Errorf("image cache: %w", err)
	}
	defer c.close()
	b.cache = c

	res, err := b.build(ctx)
	if err != nil {
		if ctx.Err() != nil {
			err = errors.Join(context.Cause(ctx), err)
		}
		return Result{}, fmt.Errorf("build session image: %w", err)
	}
	res.Took = time.Since(start)
	return res, nil
}

type builder struct {
	o     BuildOptions
	start time.Time
	cache *cache
	mu    sync.Mutex // Progress is called under it
}

func (b *builder) say(p Phase, line string) { b.report(Progress{Phase: p, Line: line}) }

func (b *builder) report(p Progress) {
	if b.o.Progress == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	p.Elapsed = time.Since(b.start)
	b.o.Progress(p)
}

// step is a layer: its cache key, and how to build it into a file with a folder to work in.
type step struct {
	phase Phase
	key   string
	tools []string
	build func(ctx context.Context, tmp, dst string, say func(string)) (*layer, error)
}

func (b *builder) build(ctx context.Context) (Result, error) {
	steps := []step{
		{PhaseBase, baseKey(b.o), []string{"mmdebstrap"}, func(ctx context.Context, tmp, dst string, say func(string)) (*layer, error) {
			return buildBase(ctx, b.o, tmp, dst, say)
		}},
		{PhaseTools, toolsKey(), []string{"npm"}, buildTools},
	}
	var leftOut []string
	if b.o.Cloudflared == "" {
		leftOut = append(leftOut, "cloudflared: it is in no package registry that the build uses; give its release binary with --with-cloudflared FILE, FOLDER or URL")
	} else {
		file, err := findCloudflared(ctx, b.o.Cloudflared, b.cache.dir, func(l string) { b.say(PhaseCloudflared, l) })
		if err != nil {
			return Result{}, err
		}
		sum, err := fileDigest(file)
		if err != nil {
			return Result{}, err
		}
		steps = append(steps, step{PhaseCloudflared, cacheKey("cloudflared", sources("tools.go", "layer.go"), sum), nil, func(_ context.Context, _, dst string, _ func(string)) (*layer, error) {
			return buildCloudflared(file, dst)
		}})
	}
	filesKey, err := filesKey()
	if err != nil {
		return Result{}, err
	}
	steps = append(steps, step{PhaseFiles, filesKey, nil, func(_ context.Context, _, dst string, _ func(string)) (*layer, error) {
		return buildFiles(dst)
	}})

	layers := make([]*layer, len(steps))
	var missing []step
	for i, s := range steps {
		if !b.o.NoCache {
			layers[i] = b.cache.layer(s.key)
		}
		if layers[i] == nil {
			missing = append(missing, s)
		} else {
			b.report(Progress{Phase: s.phase, Line: "in the cache", Done: true})
		}
	}
	if err := checkMachine(missing); err != nil {
		return Result{}, err
	}
	g, gctx := errgroup.WithContext(ctx)
	for i, s := range steps {
		if layers[i] != nil {
			continue
		}
		g.Go(func() error {
			l, err := b.buildLayer(gctx, s)
			layers[i] = l
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return Result{}, err
	}
	res, err := b.archive(layers)
	if err != nil {
		return Result{}, err
	}
	res.Cached = res.Cached && len(missing) == 0
	res.LeftOut = leftOut
	for i, l := range layers {
		res.Layers = append(res.Layers, LayerInfo{
			Name: steps[i].phase, Digest: l.LayerDigest.String(), Size: l.LayerSize, Unpacked: l.Unpacked,
			Cached: l.cached, Took: l.took,
		})
	}
	return res, b.cache.prune(layers, res.Path)
}

func (b *builder) buildLayer(ctx context.Context, s step) (*layer, error) {
	tmp, err := os.MkdirTemp(b.cache.dir, "work-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	// apt downloads as its own user where that user can enter, and as root elsewhere.
	if err := os.Chmod(tmp, 0o755); err != nil {
		return nil, err
	}
	start := time.Now()
	b.say(s.phase, describe[s.phase])
	dst := filepath.Join(tmp, "layer.tar.zst")
	l, err := s.build(ctx, tmp, dst, func(line string) { b.say(s.phase, line) })
	if err != nil {
		return nil, err
	}
	l.Key, l.Name, l.took = s.key, string(s.phase), time.Since(start)
	if err := b.cache.store(l); err != nil {
		return nil, err
	}
	b.report(Progress{Phase: s.phase, Done: true, Line: fmt.Sprintf("done in %s, %d MB", l.took.Round(100*time.Millisecond), l.LayerSize/1e6)})
	return l, nil
}

var describe = map[Phase]string{
	PhaseBase:        "installing Debian " + Suite + " with mmdebstrap; this takes about half a minute",
	PhaseTools:       "installing Node.js " + NodeVersion + " and OpenCode " + OpenCodeVersion + " with npm",
	PhaseCloudflared: "adding cloudflared",
	PhaseFiles:       "adding the preset and the entrypoint",
}

// checkMachine says all that is missing at once, before minutes are spent. A build from the cache
// needs none of it.
func checkMachine(missing []step) error {
	var tools []string
	for _, s := range missing {
		for _, tool := range s.tools {
			if _, err := exec.LookPath(tool); err != nil {
				tools = append(tools, tool)
			}
		}
		switch {
		case len(s.tools) == 0:
		case runtime.GOOS != "linux" || runtime.GOARCH != "amd64":
			return fmt.Errorf("%w; this machine is %s/%s", ErrPlatform, runtime.GOOS, runtime.GOARCH)
		case s.phase == PhaseBase && os.Geteuid() != 0:
			return fmt.Errorf("%w: run it with sudo, or build image/Dockerfile with Docker", ErrNotRoot)
		}
	}
	if len(tools) > 0 {
		return fmt.Errorf("%w: %s; run: apt-get install -y %s", ErrMissingTool, strings.Join(tools, ", "), strings.Join(tools, " "))
	}
	return nil
}

// CopyTo copies the archive to a file, under a temporary name until it is whole.
func (r Result) CopyTo(dst string) error {
	in, err := os.Open(r.Path)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.CreateTemp(filepath.Dir(dst), ".image-")
	if err != nil {
		return err
	}
	defer os.Remove(out.Name())
	_, err = io.Copy(out, in)
	if err = errors.Join(err, out.Chmod(0o644), out.Close()); err != nil {
		return err
	}
	return os.Rename(out.Name(), dst)
}
