package cli

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// specFlags are the flags that say what a session should be.
type specFlags struct {
	image    string
	env      []string
	envFiles []string
	config   string
	labels   []string
	selector []string
	cpu      quantity
	memory   quantity
	disk     quantity
	pids     int64
}

func (s *specFlags) register(cmd *cobra.Command, remove string) {
	f := cmd.Flags()
	f.StringVar(&s.image, "image", "", "container image (default: the server's)")
	f.StringArrayVarP(&s.env, "env", "e", nil, "environment variable, `NAME=VALUE`; NAME alone takes it from the environment of this command"+remove+"; can be repeated")
	f.StringArrayVar(&s.envFiles, "env-file", nil, "`FILE` with a variable per line, as for --env; # begins a comment; can be repeated")
	f.StringVar(&s.config, "opencode-config", "", "`FILE` with OpenCode's configuration as JSON; - reads stdin")
	f.StringSliceVarP(&s.labels, "label", "l", nil, "label, `KEY=VALUE`"+remove+"; can be repeated")
	f.StringSliceVar(&s.selector, "node-selector", nil, "label that the node must have, `KEY=VALUE`"+remove+"; can be repeated")
	s.cpu = quantity{parse: parseCPU, kind: "cpus"}
	s.memory = quantity{parse: parseBytes, kind: "size"}
	s.disk = quantity{parse: parseBytes, kind: "size"}
	f.Var(&s.cpu, "cpu", "CPU limit, such as 1.5 or 1500m; 0 is the server's default")
	f.Var(&s.memory, "memory", "memory limit, such as 2Gi; 0 is the server's default")
	f.Var(&s.disk, "disk", "disk limit, such as 10Gi; it can grow but not shrink; 0 is the server's default")
	f.Int64Var(&s.pids, "pids", 0, "limit of processes and threads; 0 is the server's default")
	_ = cmd.MarkFlagFilename("env-file")
	_ = cmd.MarkFlagFilename("opencode-config", "json", "jsonc")
}

// environment returns the variables of --env-file and --env, later ones winning.
// With remove, `NAME-` takes a variable away and is returned in removed.
func (s *specFlags) environment(remove bool) (set map[string]string, removed []string, err error) {
	set = map[string]string{}
	add := func(source, item string) error {
		name, value, has := strings.Cut(item, "=")
		if base, ok := strings.CutSuffix(name, "-"); ok && !has && remove {
			removed = append(removed, base)
			return nil
		}
		if name == "" || strings.ContainsAny(name, " \t\x00") {
			return usagef("%s %q: want NAME=VALUE or NAME", source, item)
		}
		if !has {
			if value, has = os.LookupEnv(name); !has {
				return usagef("%s %s: there is no such variable in the environment; give a value with %s=VALUE", source, name, name)
			}
		}
		set[name] = value
		return nil
	}
	for _, file := range s.envFiles {
		data, err := os.ReadFile(file)
		if err != nil {
			return nil, nil, usagef("--env-file: %w", err)
		}
		sc := bufio.NewScanner(bytes.NewReader(data))
		sc.Buffer(nil, 1<<20)
		for n := 1; sc.Scan(); n++ {
			line := strings.TrimLeft(strings.TrimSuffix(sc.Text(), "\r"), " \t")
			if line == "" || strings.HasPrefix(line, "#") {
				continue
			}
			if err := add(fmt.Sprintf("%s:%d", file, n), line); err != nil {
				return nil, nil, err
			}
		}
		if err := sc.Err(); err != nil {
			return nil, nil, usagef("--env-file %s: %w", file, err)
		}
	}
	for _, item := range s.env {
		if err := add("--env", item); err != nil {
			return nil, nil, err
		}
	}
	return set, removed, nil
}

// keyValues reads KEY=VALUE items; with remove also `KEY-`.
func keyValues(flag string, items []string, remove bool) (set map[string]string, removed []string, err error) {
	set = map[string]string{}
	for _, item := range items {
		key, value, has := strings.Cut(item, "=")
		if base, ok := strings.CutSuffix(item, "-"); ok && !has && remove && base != "" {
			removed = append(removed, base)
			continue
		}
		if !has || key == "" {
			return nil, nil, usagef("--%s %q: want KEY=VALUE", flag, item)
		}
		set[key] = value
	}
	return set, removed, nil
}

// maxConfig bounds what is read as a configuration, in bytes.
const maxConfig = 1 << 20

// readConfig reads --opencode-config.
func readConfig(file string, stdin io.Reader) (string, error) {
	in := stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return "", usagef("--opencode-config: %w", err)
		}
		defer f.Close()
		in = f
	} else if interactive(stdin) {
		return "", usagef("--opencode-config -: there is nothing to read on stdin; pipe the configuration in, or name a file")
	}
	data, err := io.ReadAll(io.LimitReader(in, maxConfig+1))
	switch {
	case err != nil:
		return "", usagef("--opencode-config %s: %w", file, err)
	case len(data) > maxConfig:
		return "", usagef("--opencode-config %s is larger than %s", file, formatBytes(maxConfig))
	case len(bytes.TrimSpace(data)) == 0:
		return "", usagef("--opencode-config %s is empty", file)
	}
	return string(data), nil
}

// spec returns labels and spec of a new session.
func (s *specFlags) spec(stdin io.Reader) (*cloudcodev1.Session, error) {
	env, _, errEnv := s.environment(false)
	labels, _, errLabels := keyValues("label", s.labels, false)
	selector, _, errSelector := keyValues("node-selector", s.selector, false)
	if err := errors.Join(errEnv, errLabels, errSelector); err != nil {
		return nil, err
	}
	out := &cloudcodev1.Session{Labels: labels, Spec: &cloudcodev1.SessionSpec{
		Image: s.image, Env: env, NodeSelector: selector,
		Resources: &cloudcodev1.Resources{
			CpuMillis: s.cpu.value, MemoryBytes: s.memory.value, DiskBytes: s.disk.value, Pids: s.pids,
		},
	}}
	if s.config != "" {
		config, err := readConfig(s.config, stdin)
		if err != nil {
			return nil, err
		}
		out.Spec.OpencodeConfig = config
	}
	return out, nil
}
