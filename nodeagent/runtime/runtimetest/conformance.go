package runtimetest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
)

// Fixture is what the suite needs to know about where it runs.
type Fixture struct {
	// Spec returns a spec that runs on this runtime, with everything but Args set.
	Spec func(session string) runtime.Spec
	// Command comes before the words of the helper in this package's image:
	// its path, or nothing where words are understood as they are.
	Command []string
	// Archive is the content of an image archive that ImportImage takes.
	Archive func(t *testing.T) io.Reader
}

const (
	// Port that "serve" and "stubborn" listen on in the suite.
	Port  = 8080
	limit = time.Minute
)

// Run checks one implementation. newRuntime is called once; sessions have
// different names, so that slow implementations need one set-up only.
func Run(t *testing.T, newRuntime func(t *testing.T) (runtime.Runtime, Fixture)) {
	rt, fx := newRuntime(t)
	s := &suite{rt: rt, fx: fx}
	for _, c := range []struct {
		name string
		fn   func(*testing.T, *suite)
	}{
		{"unknown session", testUnknown},
		{"ensure is idempotent", testIdempotent},
		{"generation moves in place", testGeneration},
		{"limits change in place", testResources},
		{"another spec is another container", testReplace},
		{"exit is seen and kept", testExit},
		{"pause and resume", testPause},
		{"ensure thaws", testEnsureThaws},
		{"stop is polite", testStop},
		{"stop insists", testStubborn},
		{"stop of a paused container", testStopPaused},
		{"kill", testKill},
		{"wait ends with the context", testWaitContext},
		{"wait ends with stop", testWaitStop},
		{"dial", testDial},
		{"unknown image", testImageNotFound},
		{"invalid specs", testInvalid},
		{"hooks", testHooks},
		{"sessions at the same time", testConcurrent},
		{"images", testImages},
	} {
		t.Run(c.name, func(t *testing.T) { c.fn(t, s) })
	}
}

type suite struct {
	rt runtime.Runtime
	fx Fixture
}

func testCtx(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	return ctx
}

// spec returns a spec for a session that is gone at the end of the test.
func (s *suite) spec(t *testing.T, session string, args ...string) runtime.Spec {
	t.Helper()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		defer cancel()
		if err := s.rt.Kill(ctx, session); err != nil {
			t.Errorf("removing %s: %v", session, err)
		}
	})
	spec := s.fx.Spec(session)
	spec.Args = s.args(args...)
	return spec
}

func (s *suite) args(words ...string) []string {
	return append(slices.Clone(s.fx.Command), words...)
}

func (s *suite) ensure(t *testing.T, spec runtime.Spec) runtime.Instance {
	t.Helper()
	inst, err := s.rt.Ensure(testCtx(t), spec, nil)
	if err != nil {
		t.Fatalf("Ensure(%s): %v", spec.Session, err)
	}
	if inst.Session != spec.Session || inst.Generation != spec.Generation || inst.PID == 0 || inst.ID == "" ||
		inst.ImageDigest == "" || inst.StartedAt.IsZero() || inst.State != runtime.StateRunning {
		t.Fatalf("Ensure(%s) = %+v", spec.Session, inst)
	}
	return inst
}

// listed returns the session's entry in List, nil if it has none.
func (s *suite) listed(t *testing.T, session string) *runtime.Instance {
	t.Helper()
	list, err := s.rt.List(testCtx(t))
	if err != nil {
		t.Fatalf("List: %v", err)
	}
	for i := range list {
		if list[i].Session == session {
			return &list[i]
		}
	}
	return nil
}

func wantErr(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
}

// get asks the helper inside once it answers.
func (s *suite) get(t *testing.T, session, path string) string {
	t.Helper()
	ctx := testCtx(t)
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return s.rt.Dial(ctx, session, Port)
		},
	}}
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://session"+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		res, err := client.Do(req)
		if err == nil {
			body, rerr := io.ReadAll(res.Body)
			_ = res.Body.Close()
			if rerr != nil || res.StatusCode != http.StatusOK {
				t.Fatalf("GET %s: %s %s %v", path, res.Status, body, rerr)
			}
			return string(body)
		}
		// It does not listen yet.
		timer := time.NewTimer(10 * time.Millisecond)
		select {
		case <-timer.C:
		case <-ctx.Done():
			t.Fatalf("GET %s: %v", path, err)
		}
	}
}

func testUnknown(t *testing.T, s *suite) {
	ctx := testCtx(t)
	wantErr(t, "Pause", s.rt.Pause(ctx, "nobody"), runtime.ErrNotFound)
	wantErr(t, "Resume", s.rt.Resume(ctx, "nobody"), runtime.ErrNotFound)
	_, err := s.rt.Wait(ctx, "nobody")
	wantErr(t, "Wait", err, runtime.ErrNotFound)
	_, err = s.rt.Dial(ctx, "nobody", Port)
	wantErr(t, "Dial", err, runtime.ErrNotFound)
	if err := s.rt.Stop(ctx, "nobody", time.Second); err != nil {
		t.Errorf("Stop: %v", err)
	}
	if err := s.rt.Kill(ctx, "nobody"); err != nil {
		t.Errorf("Kill: %v", err)
	}
}

func testIdempotent(t *testing.T, s *suite) {
	spec := s.spec(t, "idem", "serve", "8080")
	spec.Env = map[string]string{"A": "1", "SECRET": strings.Repeat("x", 10_000)}
	first := s.ensure(t, spec)
	second := s.ensure(t, spec)
	if first.PID != second.PID || !first.StartedAt.Equal(second.StartedAt) {
		t.Errorf("a second Ensure made another container: %+v, then %+v", first, second)
	}
	l := s.listed(t, "idem")
	if l == nil || l.PID != first.PID || l.State != runtime.StateRunning || l.Spec.Env["SECRET"] != spec.Env["SECRET"] ||
		!runtime.SameContainer(l.Spec, spec) || l.Spec.Generation != spec.Generation {
		t.Errorf("List: %+v", l)
	}
}

func testGeneration(t *testing.T, s *suite) {
	spec := s.spec(t, "gen", "serve", "8080")
	spec.Generation = 3
	first := s.ensure(t, spec)
	spec.Generation = 5
	if got := s.ensure(t, spec); got.PID != first.PID {
		t.Error("a new generation made another container")
	}
	if l := s.listed(t, "gen"); l == nil || l.Generation != 5 || l.Spec.Generation != 5 {
		t.Errorf("List: %+v", l)
	}
	spec.Generation = 4
	_, err := s.rt.Ensure(testCtx(t), spec, nil)
	wantErr(t, "an older generation", err, runtime.ErrStaleGeneration)
	if l := s.listed(t, "gen"); l == nil || l.Generation != 5 || l.PID != first.PID {
		t.Errorf("List after the refusal: %+v", l)
	}
}

func testResources(t *testing.T, s *suite) {
	spec := s.spec(t, "res", "serve", "8080")
	spec.Resources = runtime.Resources{CPUMillis: 500, MemoryBytes: 64 << 20, PIDs: 64}
	first := s.ensure(t, spec)
	for _, r := range []runtime.Resources{
		{CPUMillis: 1500, MemoryBytes: 128 << 20, PIDs: 100},
		{CPUMillis: 250, MemoryBytes: 96 << 20, PIDs: 50},
		{},
	} {
		spec.Resources = r
		if got := s.ensure(t, spec); got.PID != first.PID {
			t.Errorf("limits %+v made another container", r)
		}
		if l := s.listed(t, "res"); l == nil || l.Spec.Resources != r {
			t.Errorf("List: %+v, want limits %+v", l, r)
		}
	}
}

func testReplace(t *testing.T, s *suite) {
	spec := s.spec(t, "repl", "serve", "8080")
	first := s.ensure(t, spec)
	spec.Env = map[string]string{"NEW": "1"}
	spec.Generation++
	if got := s.ensure(t, spec); got.PID == first.PID {
		t.Error("another environment left the container")
	}
}

func testExit(t *testing.T, s *suite) {
	spec := s.spec(t, "exits", "exit", "3")
	s.ensure(t, spec)
	for range 2 { // the container stays, so Wait may be asked again
		exit, err := s.rt.Wait(testCtx(t), "exits")
		if err != nil || exit.Code != 3 || exit.OOMKilled || exit.At.IsZero() {
			t.Fatalf("Wait = %+v, %v", exit, err)
		}
	}
	l := s.listed(t, "exits")
	if l == nil || l.State != runtime.StateExited || l.Exit == nil || l.Exit.Code != 3 || l.PID != 0 {
		t.Errorf("List: %+v", l)
	}
	wantErr(t, "Pause of what has exited", s.rt.Pause(testCtx(t), "exits"), runtime.ErrNotFound)
	spec.Args = s.args("serve", "8080")
	s.ensure(t, spec)
}

func testPause(t *testing.T, s *suite) {
	ctx := testCtx(t)
	s.ensure(t, s.spec(t, "paus", "serve", "8080"))
	s.get(t, "paus", "/")
	for range 2 {
		if err := s.rt.Pause(ctx, "paus"); err != nil {
			t.Fatal(err)
		}
	}
	if l := s.listed(t, "paus"); l == nil || l.State != runtime.StatePaused {
		t.Errorf("List: %+v", l)
	}
	for range 2 {
		if err := s.rt.Resume(ctx, "paus"); err != nil {
			t.Fatal(err)
		}
	}
	if l := s.listed(t, "paus"); l == nil || l.State != runtime.StateRunning {
		t.Errorf("List: %+v", l)
	}
	s.get(t, "paus", "/")
}

func testEnsureThaws(t *testing.T, s *suite) {
	spec := s.spec(t, "thaw", "serve", "8080")
	first := s.ensure(t, spec)
	if err := s.rt.Pause(testCtx(t), "thaw"); err != nil {
		t.Fatal(err)
	}
	if got := s.ensure(t, spec); got.PID != first.PID {
		t.Error("Ensure of a paused container made another one")
	}
	s.get(t, "thaw", "/")
}

// gone checks that a stopped session has left nothing to see.
func (s *suite) gone(t *testing.T, session string) {
	t.Helper()
	if l := s.listed(t, session); l != nil {
		t.Errorf("still listed: %+v", l)
	}
	_, err := s.rt.Dial(testCtx(t), session, Port)
	wantErr(t, "Dial", err, runtime.ErrNotFound)
}

func testStop(t *testing.T, s *suite) {
	s.ensure(t, s.spec(t, "stop", "serve", "8080"))
	s.get(t, "stop", "/")
	start := time.Now()
	if err := s.rt.Stop(testCtx(t), "stop", 30*time.Second); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(start); took > 20*time.Second {
		t.Errorf("Stop took %s although the process heeds SIGTERM", took)
	}
	s.gone(t, "stop")
}

func testStubborn(t *testing.T, s *suite) {
	s.ensure(t, s.spec(t, "stub", "stubborn", "8080"))
	s.get(t, "stub", "/")
	start := time.Now()
	const grace = 300 * time.Millisecond
	if err := s.rt.Stop(testCtx(t), "stub", grace); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(start); took < grace {
		t.Errorf("Stop took %s, less than the grace of %s", took, grace)
	}
	s.gone(t, "stub")
}

func testStopPaused(t *testing.T, s *suite) {
	for _, grace := range []time.Duration{0, 10 * time.Second} {
		spec := s.spec(t, "spau", "serve", "8080")
		s.ensure(t, spec)
		s.get(t, "spau", "/")
		if err := s.rt.Pause(testCtx(t), "spau"); err != nil {
			t.Fatal(err)
		}
		if err := s.rt.Stop(testCtx(t), "spau", grace); err != nil {
			t.Fatalf("Stop with grace %s: %v", grace, err)
		}
		s.gone(t, "spau")
	}
}

func testKill(t *testing.T, s *suite) {
	s.ensure(t, s.spec(t, "kill", "stubborn", "8080"))
	if err := s.rt.Kill(testCtx(t), "kill"); err != nil {
		t.Fatal(err)
	}
	s.gone(t, "kill")
}

func testWaitContext(t *testing.T, s *suite) {
	s.ensure(t, s.spec(t, "wctx", "serve", "8080"))
	ctx, cancel := context.WithTimeout(testCtx(t), 50*time.Millisecond)
	defer cancel()
	_, err := s.rt.Wait(ctx, "wctx")
	wantErr(t, "Wait", err, context.DeadlineExceeded)
}

func testWaitStop(t *testing.T, s *suite) {
	s.ensure(t, s.spec(t, "wstop", "stubborn", "8080"))
	var (
		wg   sync.WaitGroup
		exit runtime.Exit
		err  error
	)
	ctx := testCtx(t)
	wg.Go(func() { exit, err = s.rt.Wait(ctx, "wstop") })
	if err := s.rt.Kill(ctx, "wstop"); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	// Whichever came first, the exit or the removal.
	if !errors.Is(err, runtime.ErrNotFound) && (err != nil || exit.Code != 137 || exit.OOMKilled) {
		t.Errorf("Wait = %+v, %v", exit, err)
	}
}

func testDial(t *testing.T, s *suite) {
	ctx := testCtx(t)
	s.ensure(t, s.spec(t, "dial", "serve", "8080"))
	if got := s.get(t, "dial", "/"); got != "ok\n" {
		t.Errorf("GET / = %q", got)
	}
	_, err := s.rt.Dial(ctx, "dial", 9)
	if err == nil || errors.Is(err, runtime.ErrNotFound) {
		t.Errorf("Dial of a closed port: %v, want refused", err)
	}
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if c, err := s.rt.Dial(ended, "dial", Port); err == nil {
		_ = c.Close()
		t.Error("Dial with an ended context succeeded")
	}
}

func testImageNotFound(t *testing.T, s *suite) {
	spec := s.spec(t, "noimg", "serve", "8080")
	spec.Image = "localhost/not/here:latest"
	_, err := s.rt.Ensure(testCtx(t), spec, nil)
	wantErr(t, "Ensure", err, runtime.ErrImageNotFound)
	if l := s.listed(t, "noimg"); l != nil {
		t.Errorf("a failed Ensure left %+v", l)
	}
}

func testInvalid(t *testing.T, s *suite) {
	for name, change := range map[string]func(*runtime.Spec){
		"session":      func(s *runtime.Spec) { s.Session = "../up" },
		"long session": func(s *runtime.Spec) { s.Session = strings.Repeat("a", 41) },
		"id base":      func(s *runtime.Spec) { s.IDBase = 0 },
		"log folder":   func(s *runtime.Spec) { s.LogDir = "relative" },
		"scratch":      func(s *runtime.Spec) { s.ScratchDir = "relative" },
		"mount":        func(s *runtime.Spec) { s.Mounts = []runtime.Mount{{Source: "/tmp", Destination: "x"}} },
		"root mount":   func(s *runtime.Spec) { s.Mounts = []runtime.Mount{{Source: "/tmp", Destination: "/."}} },
		"environment":  func(s *runtime.Spec) { s.Env = map[string]string{"A=B": "x"} },
		"negative":     func(s *runtime.Spec) { s.Resources.MemoryBytes = -1 },
		"tiny memory":  func(s *runtime.Spec) { s.Resources.MemoryBytes = 4096 },
		"no image":     func(s *runtime.Spec) { s.Image = "" },
	} {
		spec := s.fx.Spec("invalid")
		change(&spec)
		_, err := s.rt.Ensure(testCtx(t), spec, nil)
		wantErr(t, name, err, runtime.ErrInvalidSpec)
	}
	if l := s.listed(t, "invalid"); l != nil {
		t.Errorf("a failed Ensure left %+v", l)
	}
}

func testConcurrent(t *testing.T, s *suite) {
	var wg sync.WaitGroup
	ctx := testCtx(t)
	for i := range 4 {
		spec := s.spec(t, fmt.Sprintf("con%d", i), "serve", "8080")
		for range 2 { // and two callers for each
			wg.Go(func() {
				if _, err := s.rt.Ensure(ctx, spec, nil); err != nil {
					t.Errorf("Ensure(%s): %v", spec.Session, err)
				}
			})
		}
	}
	wg.Wait()
	for i := range 4 {
		s.get(t, fmt.Sprintf("con%d", i), "/")
	}
}

func testImages(t *testing.T, s *suite) {
	ctx := testCtx(t)
	const name = "localhost/imported:v1"
	img, err := s.rt.ImportImage(ctx, s.fx.Archive(t), name, nil)
	if err != nil || img.Name != name || img.Digest == "" || img.SizeBytes == 0 {
		t.Fatalf("ImportImage = %+v, %v", img, err)
	}
	list, err := s.rt.Images(ctx)
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, i := range list {
		found = found || i.Name == name && i.Digest == img.Digest
	}
	if !found {
		t.Errorf("Images = %+v lacks %s", list, name)
	}
	spec := s.spec(t, "imported", "serve", "8080")
	spec.Image = name
	if inst := s.ensure(t, spec); inst.ImageDigest != img.Digest {
		t.Errorf("runs image %s, want %s", inst.ImageDigest, img.Digest)
	}
	_, err = s.rt.ImportImage(ctx, strings.NewReader("bad"), name, nil)
	wantErr(t, "importing garbage", err, runtime.ErrInvalidSpec)
}

func testHooks(t *testing.T, s *suite) {
	spec := s.spec(t, "hooks", "serve", "8080")
	var called []string
	hooks := &runtime.Hooks{
		Creating: func(context.Context) error { called = append(called, "creating"); return nil },
		Created:  func(context.Context) error { called = append(called, "created"); return nil },
	}
	for range 2 { // the second finds it running
		if _, err := s.rt.Ensure(testCtx(t), spec, hooks); err != nil {
			t.Fatal(err)
		}
	}
	if want := []string{"creating", "created"}; !slices.Equal(called, want) {
		t.Errorf("called %v, want %v", called, want)
	}
	spec.Env = map[string]string{"A": "1"}
	refused := errors.New("refused")
	hooks.Created = func(context.Context) error { return refused }
	_, err := s.rt.Ensure(testCtx(t), spec, hooks)
	wantErr(t, "a hook that fails", err, refused)
	if i := s.listed(t, "hooks"); i != nil {
		t.Errorf("left behind: %+v", i)
	}
}
