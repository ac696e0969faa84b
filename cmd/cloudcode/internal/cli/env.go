package cli

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

const (
	envPrefix     = "CLOUDCODE_"
	envAnnotation = "cloudcode_env"
	noEnv         = "-"
)

// SetEnvName makes BindEnv read a flag from the variable name instead of from
// CLOUDCODE_<FLAG>. An empty name means from none. It panics if there is no
// such flag, which is a mistake in the program.
func SetEnvName(flags *pflag.FlagSet, flag, name string) {
	if name == "" {
		name = noEnv
	}
	if err := flags.SetAnnotation(flag, envAnnotation, []string{name}); err != nil {
		panic(err)
	}
}

// envName returns the environment variable of a flag; empty if it has none.
func envName(f *pflag.Flag) string {
	if f.Name == "help" || f.Name == "version" {
		return ""
	}
	if v := f.Annotations[envAnnotation]; len(v) == 1 {
		if v[0] == noEnv {
			return ""
		}
		return v[0]
	}
	return envPrefix + strings.ToUpper(strings.NewReplacer("-", "_", ".", "_").Replace(f.Name))
}

// BindEnv makes every flag of root and of the commands below it readable from
// the environment: --data-dir from CLOUDCODE_DATA_DIR and so on, or as
// SetEnvName says. A flag that is given wins; an empty variable counts as unset;
// a flag that can be repeated takes one value per line (or separated by commas,
// where the flag itself allows them). Call it last, on the whole tree: commands
// must not have a PersistentPreRun of their own.
func BindEnv(root *cobra.Command) {
	describeEnv(root)
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
		if err := applyEnv(cmd); err != nil {
			return usageError{err}
		}
		// Here rather than in cobra, so that they are told apart from errors of
		// the command itself.
		if err := cmd.ValidateRequiredFlags(); err != nil {
			return usageError{err}
		}
		if err := cmd.ValidateFlagGroups(); err != nil {
			return usageError{err}
		}
		return prepare(cmd)
	}
}

// describeEnv puts the variable into the flag's help.
func describeEnv(cmd *cobra.Command) {
	describe := func(f *pflag.Flag) {
		name := envName(f)
		if mark := " [$" + name + "]"; name != "" && !strings.HasSuffix(f.Usage, mark) {
			f.Usage += mark
		}
	}
	cmd.PersistentFlags().VisitAll(describe)
	cmd.LocalNonPersistentFlags().VisitAll(describe)
	for _, c := range cmd.Commands() {
		describeEnv(c)
	}
}

// applyEnv sets the flags of cmd that were not given from the environment.
func applyEnv(cmd *cobra.Command) error {
	var first error
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		name := envName(f)
		if first != nil || f.Changed || name == "" {
			return
		}
		value := os.Getenv(name)
		if value == "" {
			return
		}
		for _, v := range envValues(f, value) {
			if err := cmd.Flags().Set(f.Name, v); err != nil {
				// pflag's text repeats the flag; the cause is what helps.
				first = fmt.Errorf("%s=%q in the environment: %w", name, value, err)
				return
			}
		}
	})
	return first
}

// envValues splits the value of a flag that can be repeated.
func envValues(f *pflag.Flag, value string) []string {
	if _, ok := f.Value.(pflag.SliceValue); !ok {
		return []string{value}
	}
	var out []string
	for line := range strings.Lines(value) {
		if line = strings.TrimSpace(line); line != "" {
			out = append(out, line)
		}
	}
	return out
}
