package containerd

import (
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime/runtimetest"
)

const testImage = "localhost/cloudcode/test:latest"

func (e *env) spec(session string, words ...string) runtime.Spec {
	args := append([]string{"/bin/helper"}, words...)
	return runtime.Spec{
		Session: session, Generation: 1, Image: testImage, Args: args,
		IDBase: 0x10000000, LogDir: filepath.Join(e.dir, "logs", session),
	}
}

func TestConformance(t *testing.T) {
	e := newEnv(t)
	e.importImage(t, testImage)
	runtimetest.Run(t, func(t *testing.T) (runtime.Runtime, runtimetest.Fixture) {
		return e, runtimetest.Fixture{
			Spec:    func(session string) runtime.Spec { return e.spec(session) },
			Command: []string{"/bin/helper"},
			Archive: func(t *testing.T) io.Reader {
				f, err := os.Open(runtimetest.Archive(t, runtimetest.Image(t, "imported"), "localhost/other:v2"))
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = f.Close() })
				return f
			},
		}
	})
}
