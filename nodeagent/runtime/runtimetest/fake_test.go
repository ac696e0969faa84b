package runtimetest

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"

	"go.uber.org/goleak"

	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestFake(t *testing.T) {
	Run(t, func(t *testing.T) (runtime.Runtime, Fixture) {
		f := NewFake("localhost/test:latest")
		f.Handler = func(_ string, port uint16) http.Handler {
			if port != Port {
				return nil
			}
			return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
		}
		t.Cleanup(func() { _ = f.Close() })
		return f, Fixture{
			Spec: func(session string) runtime.Spec {
				return runtime.Spec{Session: session, Generation: 1, Image: "localhost/test:latest", IDBase: 1 << 28, LogDir: "/logs"}
			},
			Archive: func(*testing.T) io.Reader { return strings.NewReader("image") },
		}
	})
}

// A frozen session's requests must wait without real time passing.
func TestFakeInBubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := NewFake("localhost/test:latest")
		f.Handler = func(string, uint16) http.Handler { return http.NotFoundHandler() }
		defer f.Close()
		spec := runtime.Spec{Session: "a", Generation: 1, Image: "localhost/test:latest", IDBase: 1 << 28, LogDir: "/logs"}
		if _, err := f.Ensure(t.Context(), spec, nil); err != nil {
			t.Fatal(err)
		}
		if err := f.Pause(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
		c, err := f.Dial(t.Context(), "a", 1)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() {
			_, err := fmt.Fprintf(c, "GET / HTTP/1.0\r\n\r\n")
			if err == nil {
				_, err = io.ReadAll(c)
			}
			done <- err
		}()
		synctest.Wait()
		select {
		case err := <-done:
			t.Fatalf("a frozen session answered: %v", err)
		default:
		}
		if err := f.Resume(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	})
}
