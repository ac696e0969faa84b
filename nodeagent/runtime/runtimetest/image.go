package runtimetest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// arch is this machine's: images are for it only.
const arch = goruntime.GOARCH

const helperPackage = "github.com/cloudcode-dev/cloudcode/nodeagent/runtime/runtimetest/helper"

var buildHelper = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "helper")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	bin := filepath.Join(dir, "helper")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", bin, helperPackage)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, &buildError{out: out, err: err}
	}
	return os.ReadFile(bin)
})

type buildError struct {
	out []byte
	err error
}

func (e *buildError) Error() string { return e.err.Error() + ": " + string(e.out) }

// Image makes an image of a few megabytes that holds /bin/helper and nothing
// else but empty folders. variant makes images with different layers.
func Image(t testing.TB, variant string) v1.Image {
	t.Helper()
	helper, err := buildHelper()
	if err != nil {
		t.Fatalf("building the test helper: %v", err)
	}
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, h := range []struct {
		name string
		mode int64
		typ  byte
		data []byte
	}{
		{"bin/", 0o755, tar.TypeDir, nil},
		{"etc/", 0o755, tar.TypeDir, nil},
		{"root/", 0o700, tar.TypeDir, nil},
		{"tmp/", 0o1777, tar.TypeDir, nil},
		{"bin/helper", 0o755, tar.TypeReg, helper},
		{"etc/variant", 0o644, tar.TypeReg, []byte(variant)},
	} {
		if err := tw.WriteHeader(&tar.Header{
			Name: h.name, Mode: h.mode, Typeflag: h.typ, Size: int64(len(h.data)), ModTime: time.Unix(0, 0),
		}); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(h.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil },
		tarball.WithCompressionLevel(gzip.BestSpeed)) // compressing was most of a test's time
	if err != nil {
		t.Fatal(err)
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		t.Fatal(err)
	}
	cf, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture = "linux", arch
	cf.Config.Entrypoint = []string{"/bin/helper"}
	cf.Config.Cmd = []string{"serve", "8080"}
	cf.Config.Env = []string{"FROM_IMAGE=yes", "BOTH=image"}
	cf.Config.WorkingDir = "/root"
	// A label as an attacker would set it: it must not reach the container.
	cf.Config.Labels = map[string]string{"containerd.io/restart.status": "running", "cloudcode.dev/session": "evil"}
	if img, err = mutate.ConfigFile(img, cf); err != nil {
		t.Fatal(err)
	}
	return img
}

// Archive writes the image as a docker archive named ref.
func Archive(t testing.TB, img v1.Image, ref string) string {
	t.Helper()
	tag, err := name.NewTag(ref)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "image.tar")
	if err := tarball.WriteToFile(path, tag, img); err != nil {
		t.Fatal(err)
	}
	return path
}
