// Package runtimetest has the conformance suite for implementations of
// runtime.Runtime, the image that their tests run, and an implementation in
// memory for tests of failures that no real container makes on demand.
package runtimetest

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
)

// Fake is a runtime.Runtime without processes. Its containers do what the first
// word of Spec.Args says: "exit N" ends at once with code N, "stubborn" ignores
// SIGTERM; all others run until stopped. It uses no clock but package time's,
// and net.Pipe for connections, so it works inside testing/synctest.
type Fake struct {
	// Handler, when set, answers the connections that Dial makes. Set it before
	// the first call. Where it returns nil, connections are refused.
	Handler func(session string, port uint16) http.Handler

	mu         sync.Mutex
	wg         sync.WaitGroup
	containers map[string]*fakeContainer
	images     map[string]runtime.Image
	fail       map[string][]error
	calls      []string
	lastPID    int
}

var _ runtime.Runtime = (*Fake)(nil)

type fakeContainer struct {
	inst   runtime.Instance
	exited chan struct{} // closed when the process has ended
	ports  map[uint16]*fakeListener
}

// NewFake returns a Fake that has the given images.
func NewFake(images ...string) *Fake {
	f := &Fake{
		containers: map[string]*fakeContainer{}, images: map[string]runtime.Image{},
		fail: map[string][]error{}, lastPID: 1000,
	}
	for _, name := range images {
		f.images[name] = runtime.Image{Name: name, Digest: "sha256:" + name, SizeBytes: 1, CreatedAt: time.Now()}
	}
	return f
}

// FailNext makes the next call of method, by its name, for session return err.
// Several wait in line.
func (f *Fake) FailNext(method, session string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	key := method + " " + session
	f.fail[key] = append(f.fail[key], err)
}

// Exit ends a container's process. It panics when there is none that runs.
func (f *Fake) Exit(session string, code int, oom bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.end(f.containers[session], code, oom)
}

// Vanish removes a container as a reboot does: nothing says goodbye.
func (f *Fake) Vanish(session string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if c := f.containers[session]; c != nil {
		if c.inst.Exit == nil {
			f.end(c, 255, false)
		}
		delete(f.containers, session)
	}
}

// Calls returns the calls so far, as "Ensure a", "Stop a", …
func (f *Fake) Calls() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.calls)
}

// enter notes a call and returns the failure that waits for it. mu is held.
func (f *Fake) enter(ctx context.Context, method, session string) error {
	key := method + " " + session
	f.calls = append(f.calls, key)
	if errs := f.fail[key]; len(errs) > 0 {
		f.fail[key] = errs[1:]
		return errs[0]
	}
	return ctx.Err()
}

func (f *Fake) find(session string) (*fakeContainer, error) {
	c := f.containers[session]
	if c == nil {
		return nil, fmt.Errorf("%w: session %s", runtime.ErrNotFound, session)
	}
	return c, nil
}

func (f *Fake) end(c *fakeContainer, code int, oom bool) {
	c.inst.State, c.inst.PID = runtime.StateExited, 0
	c.inst.Exit = &runtime.Exit{Code: code, OOMKilled: oom, At: time.Now()}
	for _, l := range c.ports {
		l.shut()
	}
	close(c.exited)
}

// Ensure implements runtime.Runtime.
func (f *Fake) Ensure(ctx context.Context, spec runtime.Spec, hooks *runtime.Hooks) (runtime.Instance, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.enter(ctx, "Ensure", spec.Session); err != nil {
		return runtime.Instance{}, err
	}
	if err := runtime.ValidateSpec(spec); err != nil {
		return runtime.Instance{}, err
	}
	if c := f.containers[spec.Session]; c != nil {
		if c.inst.Generation > spec.Generation {
			return runtime.Instance{}, fmt.Errorf("%w: session %s is at generation %d", runtime.ErrStaleGeneration, spec.Session, c.inst.Generation)
		}
		if c.inst.Exit == nil && runtime.SameContainer(c.inst.Spec, spec) {
			c.inst.Spec, c.inst.Generation = spec, spec.Generation
			f.thaw(c)
			return c.inst, nil
		}
	}
	img, ok := f.images[spec.Image]
	if !ok {
		return runtime.Instance{}, fmt.Errorf("%w: %s", runtime.ErrImageNotFound, spec.Image)
	}
	hooks.Report(runtime.Progress{Phase: runtime.PhaseContainer, Detail: "creating the container"})
	if c := f.containers[spec.Session]; c != nil && c.inst.Exit == nil {
		f.end(c, 137, false)
	}
	delete(f.containers, spec.Session)
	if err := hooks.BeforeCreate(ctx); err != nil {
		return runtime.Instance{}, err
	}
	if err := hooks.AfterCreate(ctx); err != nil {
		return runtime.Instance{}, err
	}
	f.lastPID++
	c := &fakeContainer{exited: make(chan struct{}), ports: map[uint16]*fakeListener{}, inst: runtime.Instance{
		Session: spec.Session, Generation: spec.Generation, ID: spec.Session, State: runtime.StateRunning,
		PID: f.lastPID, ImageDigest: img.Digest, Spec: spec, StartedAt: time.Now(),
	}}
	f.containers[spec.Session] = c
	started := c.inst
	if len(spec.Args) > 1 && spec.Args[0] == "exit" {
		code, _ := strconv.Atoi(spec.Args[1])
		f.end(c, code, false)
	}
	return started, nil
}

// Pause implements runtime.Runtime.
func (f *Fake) Pause(ctx context.Context, session string) error {
	return f.live(ctx, "Pause", session, func(c *fakeContainer) {
		c.inst.State = runtime.StatePaused
		for _, l := range c.ports {
			l.setFrozen(true)
		}
	})
}

// Resume implements runtime.Runtime.
func (f *Fake) Resume(ctx context.Context, session string) error {
	return f.live(ctx, "Resume", session, f.thaw)
}

func (f *Fake) thaw(c *fakeContainer) {
	c.inst.State = runtime.StateRunning
	for _, l := range c.ports {
		l.setFrozen(false)
	}
}

func (f *Fake) live(ctx context.Context, method, session string, do func(*fakeContainer)) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.enter(ctx, method, session); err != nil {
		return err
	}
	c, err := f.find(session)
	if err != nil {
		return err
	}
	if c.inst.Exit != nil {
		return fmt.Errorf("%w: session %s has exited", runtime.ErrNotFound, session)
	}
	do(c)
	return nil
}

// Stop implements runtime.Runtime.
func (f *Fake) Stop(ctx context.Context, session string, grace time.Duration) error {
	return f.stop(ctx, "Stop", session, grace)
}

// Kill implements runtime.Runtime.
func (f *Fake) Kill(ctx context.Context, session string) error {
	return f.stop(ctx, "Kill", session, 0)
}

func (f *Fake) stop(ctx context.Context, method, session string, grace time.Duration) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.enter(ctx, method, session); err != nil {
		return err
	}
	c := f.containers[session]
	if c == nil {
		return nil
	}
	code := 143
	if grace == 0 {
		code = 137
	} else if len(c.inst.Spec.Args) > 0 && c.inst.Spec.Args[0] == "stubborn" && c.inst.Exit == nil {
		code = 137
		f.mu.Unlock()
		t := time.NewTimer(grace)
		select {
		case <-t.C:
		case <-c.exited:
		case <-ctx.Done():
		}
		t.Stop()
		f.mu.Lock()
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	if c.inst.Exit == nil {
		f.end(c, code, false)
	}
	if f.containers[session] == c {
		delete(f.containers, session)
	}
	return nil
}

// Wait implements runtime.Runtime.
func (f *Fake) Wait(ctx context.Context, session string) (runtime.Exit, error) {
	f.mu.Lock()
	err := f.enter(ctx, "Wait", session)
	c, ferr := f.find(session)
	f.mu.Unlock()
	if err != nil {
		return runtime.Exit{}, err
	}
	if ferr != nil {
		return runtime.Exit{}, ferr
	}
	select {
	case <-c.exited:
		f.mu.Lock()
		defer f.mu.Unlock()
		return *c.inst.Exit, nil
	case <-ctx.Done():
		return runtime.Exit{}, ctx.Err()
	}
}

// List implements runtime.Runtime.
func (f *Fake) List(ctx context.Context) ([]runtime.Instance, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.enter(ctx, "List", ""); err != nil {
		return nil, err
	}
	var out []runtime.Instance
	for _, s := range slices.Sorted(maps.Keys(f.containers)) {
		out = append(out, f.containers[s].inst)
	}
	return out, nil
}

// Dial implements runtime.Runtime.
func (f *Fake) Dial(ctx context.Context, session string, port uint16) (net.Conn, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.enter(ctx, "Dial", session); err != nil {
		return nil, err
	}
	c, err := f.find(session)
	if err != nil {
		return nil, err
	}
	var h http.Handler
	if f.Handler != nil && c.inst.Exit == nil {
		h = f.Handler(session, port)
	}
	if h == nil {
		return nil, fmt.Errorf("session %s port %d: %w", session, port, syscall.ECONNREFUSED)
	}
	l := c.ports[port]
	if l == nil {
		l = newFakeListener(c.inst.State == runtime.StatePaused)
		c.ports[port] = l
		srv := &http.Server{Handler: h}
		l.srv = srv
		f.wg.Go(func() { _ = srv.Serve(l) }) // ends with the listener
	}
	client, server := net.Pipe()
	l.add(server)
	return client, nil
}

// ImportImage implements runtime.Runtime: the archive is any text, "bad" fails.
func (f *Fake) ImportImage(ctx context.Context, archive io.Reader, name string, _ func(runtime.Progress)) (runtime.Image, error) {
	data, err := io.ReadAll(archive)
	if err != nil {
		return runtime.Image{}, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.enter(ctx, "ImportImage", name); err != nil {
		return runtime.Image{}, err
	}
	if name == "" || string(data) == "bad" {
		return runtime.Image{}, fmt.Errorf("%w: no image archive", runtime.ErrInvalidSpec)
	}
	img := runtime.Image{Name: name, Digest: "sha256:" + name, SizeBytes: int64(len(data)), CreatedAt: time.Now()}
	f.images[name] = img
	return img, nil
}

// Images implements runtime.Runtime.
func (f *Fake) Images(ctx context.Context) ([]runtime.Image, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.enter(ctx, "Images", ""); err != nil {
		return nil, err
	}
	return slices.SortedFunc(maps.Values(f.images), func(a, b runtime.Image) int {
		return len(a.Name) - len(b.Name)
	}), nil
}

// Close implements runtime.Runtime. Unlike a real one it also ends every
// container: nothing of a test may outlive it.
func (f *Fake) Close() error {
	f.mu.Lock()
	for _, c := range f.containers {
		if c.inst.Exit == nil {
			f.end(c, 137, false)
		}
	}
	f.mu.Unlock()
	f.wg.Wait()
	return nil
}

// fakeListener hands connections to a server, but not while frozen.
type fakeListener struct {
	srv    *http.Server
	mu     sync.Mutex
	cond   *sync.Cond
	queue  []net.Conn
	frozen bool
	closed bool
}

func newFakeListener(frozen bool) *fakeListener {
	l := &fakeListener{frozen: frozen}
	l.cond = sync.NewCond(&l.mu)
	return l
}

func (l *fakeListener) update(fn func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	fn()
	l.cond.Broadcast()
}

func (l *fakeListener) setFrozen(v bool)  { l.update(func() { l.frozen = v }) }
func (l *fakeListener) add(conn net.Conn) { l.update(func() { l.queue = append(l.queue, conn) }) }

// shut closes the listener and all its connections.
func (l *fakeListener) shut() { _ = l.srv.Close(); _ = l.Close() }

// Accept implements net.Listener.
func (l *fakeListener) Accept() (net.Conn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for !l.closed && (l.frozen || len(l.queue) == 0) {
		l.cond.Wait()
	}
	if l.closed {
		return nil, net.ErrClosed
	}
	c := l.queue[0]
	l.queue = l.queue[1:]
	return c, nil
}

// Close implements net.Listener.
func (l *fakeListener) Close() error {
	l.update(func() {
		l.closed = true
		for _, c := range l.queue {
			_ = c.Close()
		}
		l.queue = nil
	})
	return nil
}

// Addr implements net.Listener.
func (l *fakeListener) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)} }
