package mount

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fake is a mount that fails on demand.
type fake struct {
	mu        sync.Mutex
	mounted   bool
	probe     error // what Probe returns
	mountErr  error
	mounts    int
	abandoned int
	unmounted int
	block     chan struct{} // Mount waits for it, or for its context
}

func (f *fake) Name() string                            { return "fake" }
func (f *fake) Version(context.Context) (string, error) { return "1", nil }
func (f *fake) Sync(context.Context, string) error      { return nil }
func (f *fake) List(context.Context) ([]Status, error)  { return nil, nil }

func (f *fake) Mount(ctx context.Context, _ Spec) error {
	f.mu.Lock()
	block := f.block
	f.mu.Unlock()
	if block != nil {
		select {
		case <-block:
		case <-ctx.Done():
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mounts++
	if f.mountErr == nil {
		f.mounted, f.probe = true, nil
	}
	return f.mountErr
}

func (f *fake) Probe(context.Context, string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.probe
}

func (f *fake) Unmount(context.Context, string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.unmounted++
	f.mounted = false
	return nil
}

func (f *fake) Abandon(context.Context, string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.abandoned++
	f.mounted = false
	return nil
}

func (f *fake) set(fn func(*fake)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	fn(f)
}

type history struct {
	mu  sync.Mutex
	all []string
}

func (h *history) add(s State, message string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.all = append(h.all, strings.TrimSpace(fmt.Sprint(s, " ", message)))
}

func (h *history) get() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.all)
}

func start(t *testing.T, f *fake) (*Supervisor, *history) {
	t.Helper()
	h := &history{}
	s := &Supervisor{Mounter: f, Spec: Spec{ID: "s"}, OnChange: h.add}
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return s, h
}

func TestSupervisorRemountsDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{}
		s, h := start(t, f)
		attached := 0
		s.Remounted = func(context.Context) error { attached++; return nil }
		time.Sleep(time.Hour)
		f.set(func(f *fake) { f.probe = ErrDead })
		time.Sleep(6 * time.Second)
		synctest.Wait()
		s.Stop()
		if f.mounts != 2 || attached != 1 {
			t.Errorf("%d mounts, attached %d times", f.mounts, attached)
		}
		want := []string{"MOUNTED", "REMOUNTING mounter has died", "MOUNTED"}
		if got := h.get(); !slices.Equal(got, want) {
			t.Errorf("states %q, want %q", got, want)
		}
		if !f.mounted || f.unmounted != 0 || f.abandoned != 0 {
			t.Errorf("Stop changed the mount: %+v", f)
		}
	})
}

func TestSupervisorIsPatientWithSlowMounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{}
		s, _ := start(t, f)
		f.set(func(f *fake) { f.probe = ErrHung })
		time.Sleep(15 * time.Second)
		f.set(func(f *fake) { f.probe = nil })
		time.Sleep(time.Minute)
		if synctest.Wait(); f.mounts != 1 {
			t.Error("a mount that was slow for 15 s was made anew")
		}
		f.set(func(f *fake) { f.probe = ErrHung })
		time.Sleep(30 * time.Second)
		if synctest.Wait(); f.mounts != 2 {
			t.Error("a mount that hung for 30 s was not made anew")
		}
		s.Stop()
	})
}

func TestSupervisorBacksOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{}
		s, h := start(t, f)
		attachErr := errors.New("not attached")
		var mu sync.Mutex
		s.Remounted = func(context.Context) error { mu.Lock(); defer mu.Unlock(); return attachErr }
		f.set(func(f *fake) { f.probe, f.mountErr = ErrDead, fmt.Errorf("%w: no way", ErrFailed) })
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if f.mounts < 10 || f.mounts > 20 {
			t.Errorf("%d tries in 10 minutes", f.mounts)
		}
		got := h.get()
		if last := got[len(got)-1]; !strings.HasPrefix(last, "FAILED mounting failed: no way (try ") {
			t.Errorf("last state %q", last)
		}
		// Mounting works again, attaching does not: that is no mount either.
		f.set(func(f *fake) { f.mountErr = nil })
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		got = h.get()
		if last := got[len(got)-1]; !strings.HasPrefix(last, "FAILED not attached") {
			t.Errorf("last state %q", last)
		}
		mu.Lock()
		attachErr = nil
		mu.Unlock()
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if got = h.get(); got[len(got)-1] != "MOUNTED" {
			t.Errorf("last state %q", got[len(got)-1])
		}
		// Soon after that it still counts as one that fails often; later not.
		f.set(func(f *fake) { f.probe = ErrDead })
		time.Sleep(6 * time.Second)
		synctest.Wait()
		if got = h.get(); !strings.HasPrefix(got[len(got)-1], "FAILED") {
			t.Errorf("last state %q", got[len(got)-1])
		}
		time.Sleep(time.Hour)
		f.set(func(f *fake) { f.probe = ErrDead })
		time.Sleep(6 * time.Second)
		synctest.Wait()
		if got = h.get(); got[len(got)-1] != "MOUNTED" || got[len(got)-2] != "REMOUNTING mounter has died" {
			t.Errorf("last states %q", got[len(got)-2:])
		}
		s.Stop()
	})
}

func TestSupervisorEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{}
		s, _ := start(t, f)
		if err := s.Close(t.Context()); err != nil || f.unmounted != 1 {
			t.Errorf("Close: %v, %d unmounts", err, f.unmounted)
		}
		s.Stop()

		// Abandon while it is being mounted anew: at its end nothing is mounted.
		f = &fake{}
		s, _ = start(t, f)
		f.set(func(f *fake) { f.probe, f.block = ErrDead, make(chan struct{}) })
		time.Sleep(6 * time.Second)
		synctest.Wait()
		if err := s.Abandon(t.Context()); err != nil {
			t.Error(err)
		}
		if f.mounted || f.mounts != 2 {
			t.Errorf("after Abandon: mounted %v, %d mounts", f.mounted, f.mounts)
		}

		f = &fake{mountErr: ErrFailed}
		s = &Supervisor{Mounter: f}
		if err := s.Start(t.Context()); !errors.Is(err, ErrFailed) {
			t.Errorf("Start: %v", err)
		}
		s.Stop()
		if err := s.Abandon(t.Context()); err != nil {
			t.Error(err)
		}
	})
}
